# autopart with its tools, on CPUs or, with the driver of the host, on GPUs:
#
#     docker build -t autopart .
#     docker run --rm autopart plan gpt2 8:a100-80gb
#     docker run --rm --gpus all --ipc host autopart run gpt2 2:h100-80gb --sequence 128
#     docker run --rm --entrypoint make autopart quick
#
# Two nodes (python -m benchmarks.runtime.two_nodes) need --cap-add NET_ADMIN --cap-add SYS_ADMIN.

FROM python:3.12-slim-bookworm

# g++ is for Triton and torch.compile, iproute2 for two nodes.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ iproute2 make \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /autopart

# The environment is a layer of its own, made anew when the dependencies change.
COPY pyproject.toml Makefile README.md LICENSE ./
COPY constraints constraints
COPY autopart autopart
RUN PIP_NO_CACHE_DIR=1 make setup PYTHONS=3.12

COPY . .

ENV PATH=/autopart/.venv/bin:$PATH
ENTRYPOINT ["autopart"]
CMD ["--help"]
