"""Machine code of the kernels for GPUs that are not here: matrix instructions, spills, shared memory, wide loads ahead."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TARGETS = ["sm_80", "sm_90a", "sm_100a", "gfx942"]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """Everything that is shipped, compiled in a process of its own: here the kernels are interpreted."""
    file: Path = tmp_path_factory.mktemp("aot") / "kernels.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "droidspeak_ops.cli", "compile", "--json", str(file)]
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL, timeout=1800)
    return json.loads(file.read_text())["kernels"]


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_spills_and_shared_memory_fits(kernels: list[dict], target: str) -> None:
    compiled = [kernel for kernel in kernels if kernel["target"] == target]
    assert len(compiled) >= 20
    assert {kernel["kernel"] for kernel in compiled} == {
        "_project_splice_kernel",
        "_row_norm_kernel",
        "_kv_splice_kernel",
    }
    for kernel in compiled:
        assert kernel["spills"] == 0, kernel
        assert 0 < kernel["registers"] <= (512 if target == "gfx942" else 255), kernel
        assert kernel["shared_bytes"] <= kernel["shared_limit"], kernel


@pytest.mark.parametrize("target", TARGETS)
def test_projections_use_matrix_instructions(kernels: list[dict], target: str) -> None:
    compiled = [
        kernel for kernel in kernels if kernel["target"] == target and kernel["kernel"] == "_project_splice_kernel"
    ]
    half = [kernel for kernel in compiled if "float32" not in kernel["config"]]
    assert len(half) >= 15
    for kernel in half:
        assert kernel["matrix_instructions"] >= 8, kernel
        if target != "gfx942":
            assert kernel["async_copies"] > 0, "the loop is not pipelined: " + str(kernel)


def test_an_unknown_target_is_named() -> None:
    from droidspeak_ops.aot import compile_all

    with pytest.raises(ValueError, match="targets: got \\['sm_75'\\]"):
        next(compile_all(["sm_80", "sm_75"]))
