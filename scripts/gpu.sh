#!/usr/bin/env bash
# Everything marked gpu, then the GPU benchmarks, also where one fails. PYTHON chooses another interpreter than .venv's.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

has_gpu=$("$python" -c 'import torch; print(torch.cuda.is_available())')
if [ "$has_gpu" != True ]; then
    echo "No GPU here: no GPU test and no benchmark was run."
    exit
fi
status=0
"$python" -m pytest -o addopts= -m gpu -v tests || status=1
"$python" -m benchmarks.gpu || status=1
"$python" -m benchmarks.kernels.dropout || status=1
"$python" -m benchmarks.accuracy.gpu --json benchmarks/results/gpu.json || status=1
exit $status
