#!/usr/bin/env bash
# Everything marked gpu, then the GPU benchmarks. PYTHON chooses another interpreter than .venv's.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

has_gpu=$("$python" -c 'import torch; print(torch.cuda.is_available())')
if [ "$has_gpu" != True ]; then
    echo "No GPU here: no GPU test and no benchmark was run."
    exit
fi
"$python" -m pytest -o addopts= -m gpu -v tests
"$python" -m benchmarks.kernels.rms_norm
"$python" -m benchmarks.kernels.dropout
"$python" -m benchmarks.accuracy.gpu --json benchmarks/results/gpu.json
