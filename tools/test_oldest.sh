#!/usr/bin/env bash
# The tests on the oldest supported versions, in an environment of their own: `tools/test_oldest.sh FOLDER`. By hand, before a
# release and after a change to kernels or operators: torch 2.11 has no small build for the CPU, and takes 5 GB with CUDA.
#
# CI runs what is small: Triton 3.6 beside the pinned torch, and transformers 5.16.1. Here the versions are those of a GPU
# machine (torch and Triton the oldest, transformers not), so this is also what shows that tests and benches work there.
# An environment that is in the folder already is used as it is. About 25 minutes on two cores, without the installation.
set -euo pipefail

if [ $# -ne 1 ]; then
    echo "usage: $0 FOLDER" >&2
    exit 2
fi
environment=$(realpath -m "$1")
cd "$(dirname "$0")/.."

if [ ! -e "$environment/bin/python" ]; then
    python3 -m venv "$environment"
    "$environment/bin/pip" install torch==2.11.0 triton==3.6.0 transformers==5.17.0 numpy==2.1.3 \
        safetensors accelerate einops filelock fsspec matplotlib msgspec peft rich torchmetrics xxhash hypothesis psutil \
        pytest pytest-benchmark
fi
export PYTHONPATH=.  # the package is not installed, as on a machine that gets the working tree alone
python="$environment/bin/python"
"$python" -c "import torch, triton, transformers, numpy as np; print(*(m.__version__ for m in (torch, triton, transformers, np)))"

"$python" -m pytest --quiet --collect-only > /dev/null  # what is missing there must not end a plain run
"$python" -m pytest --quiet tests/kernels tests/ops/test_{ops,properties}.py tests/proof/test_traffic.py
"$python" -m pytest --quiet tests/proof/test_aot.py -k sm_90a
"$python" -m pytest --quiet tests/context tests/prefill tests/hf tests/fitting tests/profiling/test_replay.py
"$python" -m pytest --quiet tests/bench/test_bench_gpu.py
