"""Machine code of the kernels for GPUs that are not here: matrix instructions in the inner loop, spills, shared memory, wide
asynchronous loads; and the reader of that code on listings written by hand."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from filelock import FileLock
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from droidspeak_ops.proof import aot, machine_code
from droidspeak_ops.proof.shapes import SHAPES
from droidspeak_ops.proof.targets import TARGETS, occupancy, time_floor


@pytest.fixture(scope="module", params=TARGETS)
def target(request: pytest.FixtureRequest) -> str:
    """One alone is ``-k sm_90a``."""
    return request.param


@pytest.fixture(scope="module")
def kernels(target: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """Everything that is shipped, compiled for a target in a process of its own: here the kernels are interpreted."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # once for all processes of a run, whose folders lie side by side
        folder = folder.parent
    file = folder / f"kernels-{target}.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "droidspeak_ops.cli", "compile", "--targets", target, "--json", str(file)]
    with FileLock(file.with_suffix(".lock")):
        if not file.exists():
            subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL, timeout=900)
    return json.loads(file.read_text())["kernels"]


ATTENTION_KERNELS = ("_attention_lse_kernel", "_attention_peaks_kernel", "_attend_rows_kernel")


def test_nothing_spills_and_shared_memory_fits(kernels: list[dict], target: str) -> None:
    assert len(kernels) >= 60
    assert {kernel["target"] for kernel in kernels} == {target}
    assert {kernel["kernel"] for kernel in kernels} == {
        "_project_splice_kernel",
        "_row_norm_kernel",
        "_kv_splice_kernel",
        "_head_norm_kernel",
        *ATTENTION_KERNELS,
        "_raise_peaks_kernel",
        "_combine_splits_kernel",
        *(["_project_splice_tma_kernel"] if target == "sm_90a" else []),
    }
    assert all(any(kernel["config"].startswith(model) for kernel in kernels) for model in SHAPES)
    for kernel in kernels:
        assert kernel["spills"] == 0, kernel
        assert 0 < kernel["registers"] <= (512 if target == "gfx942" else 255), kernel
        assert kernel["shared_bytes"] <= kernel["shared_limit"], kernel
        assert kernel["occupancy"] >= 1, kernel


def test_inner_loops_are_matrix_instructions_fed_by_wide_asynchronous_copies(kernels: list[dict], target: str) -> None:
    half = [
        kernel
        for kernel in kernels
        if kernel["kernel"].startswith("_project_splice") and "fp32" not in kernel["config"]
    ]
    assert len(half) >= 3 * len(SHAPES)
    for kernel in half:
        # One HGMMA or UTC*MMA is many of the others: 64 or 128 rows by the width of the tile.
        assert kernel["loop_matrix_instructions"] >= (4 if target in ("sm_90a", "sm_100a") else 8), kernel
        by_tma = kernel["kernel"] == "_project_splice_tma_kernel"
        if not by_tma:  # whose loads are copies of tiles; a persistent one has those of its epilogue in the loop too
            # A narrow tile of weights is 8 bytes for each of AMD's 256 threads.
            assert kernel["load_bits"] >= (64 if target == "gfx942" else 128), kernel
        if target != "gfx942":
            # By TMA a tile of x and one of the weights is a copy each.
            assert kernel["loop_async_copies"] >= (2 if by_tma else 4), "the loop is not pipelined: " + str(kernel)


def test_attention_is_matrix_instructions_whose_keys_are_loaded_ahead(kernels: list[dict], target: str) -> None:
    half = [kernel for kernel in kernels if kernel["kernel"] in ATTENTION_KERNELS and "fp32" not in kernel["config"]]
    assert len(half) == 6
    for kernel in half:
        assert kernel["loop_matrix_instructions"] >= 8, kernel
        # A program of the peaks' kernel loads its keys once; its loop is over rows.
        if target != "gfx942" and kernel["kernel"] != "_attention_peaks_kernel":
            assert kernel["loop_async_copies"] >= 4, "the loop is not pipelined: " + str(kernel)
        if kernel["kernel"] == "_attend_rows_kernel":
            assert kernel["store_bits"] == 128, kernel


def test_streaming_kernels_load_and_store_wide(kernels: list[dict]) -> None:
    streaming = [kernel for kernel in kernels if kernel["kernel"] in ("_row_norm_kernel", "_kv_splice_kernel")]
    for kernel in streaming:
        eight_bits = "8" in kernel["config"].partition(" to ")[2]
        per_thread = 4 if kernel["target"] == "gfx942" and kernel["kernel"] == "_kv_splice_kernel" else 8
        partial_rotary = kernel["config"].startswith(("Phi-2", "Nemotron")) and "rotated" in kernel["config"]
        if "1/rms" not in kernel["config"] and not partial_rotary:
            assert kernel["store_bits"] >= per_thread * (8 if eight_bits else 16), kernel
            assert kernel["load_bits"] >= 32, kernel


def test_floors_grow_with_the_tokens(kernels: list[dict], target: str) -> None:
    for kernel in kernels:
        floors = [kernel["floor_us"][tokens] for tokens in ("1024", "8192", "32768")]
        assert 0 < floors[0] < floors[1] < floors[2], kernel
    llama = next(kernel for kernel in kernels if kernel["config"] == "Llama-3-8B bf16 K+V")
    # 2 · tokens · 4096 · 2 · 1024 operations
    floor = 2 * 8192 * 4096 * 2048 / (TARGETS[target].half_tflops * 1e12) * 1e6
    assert llama["floor_us"]["8192"] == pytest.approx(floor, rel=1e-3)


class Pointers(NamedTuple):
    x: Any
    k_weight: Any


def test_floors_count_what_descriptors_describe_once() -> None:
    """As pointers in a named tuple, as TMA descriptors, or as both."""
    x, weight = (torch.empty(*shape, dtype=torch.bfloat16, device="meta") for shape in ((8192, 512), (256, 512)))
    pointers = Pointers((x,), (weight, None))
    descriptors = [TensorDescriptor.from_tensor(tensor, [64, 64]) for tensor in (x, weight)]
    products, moved = 2 * 8192 * 512 * 256 / 989e12 * 1e6, (x.nbytes + weight.nbytes) / 3.35e12 * 1e6
    assert products < moved
    for names, arguments, expected in (
        (["layers"], [pointers], moved),
        (["x0", "k0"], descriptors, moved),
        (["layers", "x0", "x1", "k0"], [pointers, descriptors[0], *descriptors], moved),
    ):
        kernel = SimpleNamespace(__name__="_project_splice_kernel", arg_names=names)
        assert aot._time_floor("sm_90a", aot.Launch(kernel, tuple(arguments), {})) == pytest.approx(expected)


def test_floors_of_attention_are_of_both_products() -> None:
    q, key_slots = (
        torch.empty(1, 500, 32, 128, dtype=torch.bfloat16, device="meta"),
        torch.empty(1, 8192, device="meta"),
    )
    for name, products in (("_attention_peaks_kernel", 1), ("_attend_rows_kernel", 2)):
        launch = aot.Launch(SimpleNamespace(__name__=name, arg_names=["q_ptr", "key_slots_ptr"]), (q, key_slots), {})
        floor = products * 2 * 500 * 32 * 128 * 8192 / 989e12 * 1e6
        assert aot._time_floor("sm_90a", launch) == pytest.approx(floor)


def test_descriptors_inside_tuples_are_refused() -> None:
    descriptor = TensorDescriptor.from_tensor(torch.empty(64, 64, device="meta"), [16, 16])
    with pytest.raises(ValueError, match="inside a tuple"):
        aot.caught(lambda: JITFunction.run("kernel", (None, descriptor), grid=(1,), warmup=False))


def test_an_unknown_target_is_named() -> None:
    with pytest.raises(ValueError, match="targets: expected some of .*, got \\['sm_75'\\]"):
        next(aot.compile_all(["sm_80", "sm_75"]))


def test_occupancy_is_limited_by_what_runs_out_first() -> None:
    assert occupancy("sm_90a", registers=255, shared_bytes=0, num_warps=8) == 1  # 65,536 registers
    assert occupancy("sm_90a", registers=128, shared_bytes=0, num_warps=4) == 4
    assert occupancy("sm_90a", registers=32, shared_bytes=96 << 10, num_warps=8) == 2  # 228 KiB
    assert occupancy("sm_80", registers=32, shared_bytes=0, num_warps=8) == 8  # 64 warps
    assert occupancy("gfx942", registers=182, shared_bytes=16 << 10, num_warps=4) == 2
    assert occupancy("gfx942", registers=64, shared_bytes=32 << 10, num_warps=4) == 2  # 64 KiB


def test_time_floor_is_of_operations_or_of_bytes() -> None:
    assert time_floor("sm_90a", 989e12, 0, half=True) == pytest.approx(1e6)
    assert time_floor("sm_90a", 0, 3.35e12, half=True) == pytest.approx(1e6)
    assert time_floor("sm_90a", 67e12, 1, half=False) == pytest.approx(1e6)


SASS = """
.L_x_0:
        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0010*/              @!P0 BRA `(.L_x_1) ;
.L_x_2:
        /*0020*/                   LDGSTS.E.BYPASS.128 [R10], desc[UR4][R2.64] ;
        /*0030*/               @P1 LDGSTS.E.64 [R11], desc[UR4][R6.64] ;
        /*0040*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0050*/              @!P2 BRA `(.L_x_2) ;
        /*0060*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0070*/                   STG.E.64 desc[UR4][R2.64], R4 ;
.L_x_1:
        /*0080*/               @P0 BRA `(.L_x_0) ;
        /*0090*/                   EXIT ;
"""


def test_the_innermost_loop_with_matrix_instructions_is_found() -> None:
    code = machine_code.read(SASS, TARGETS["sm_80"].matrix_instruction, registers=40, spills=0)
    assert (code.matrix_instructions, code.loop_matrix_instructions) == (2, 1)
    assert (code.loop_instructions, code.loop_async_copies) == (4, 2)
    assert (code.load_bits, code.store_bits) == (64, 64)


TMA = """
.L_x_0:
        /*0010*/                   UTMALDG.2D [UR4], [UR8], desc[UR10] ;
        /*0020*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24, !UPT ;
        /*0030*/              @!P2 BRA `(.L_x_0) ;
        /*0040*/                   STG.E.128 desc[UR4][R2.64], R4 ;
"""


def test_copies_by_tma_are_wide() -> None:
    code = machine_code.read(TMA, TARGETS["sm_90a"].matrix_instruction, registers=90, spills=0)
    assert (code.loop_async_copies, code.load_bits, code.store_bits) == (1, 128, 128)


AMD = """
\ts_load_dwordx4 s[0:3], s[4:5], 0x0
.LBB0_1:
\tbuffer_load_dwordx4 v[0:3], v4, s[0:3], 0 offen
\tv_mfma_f32_32x32x8_bf16_1k a[0:15], v[0:1], v[2:3], a[0:15]
\ts_cbranch_scc1 .LBB0_1
\tglobal_store_dwordx2 v[0:1], v[2:3], off
"""


def test_amd_assembly_is_read_too() -> None:
    code = machine_code.read(AMD, TARGETS["gfx942"].matrix_instruction, registers=40, spills=0)
    assert (code.matrix_instructions, code.loop_matrix_instructions, code.loop_instructions) == (1, 1, 3)
    assert (code.load_bits, code.store_bits) == (128, 64)
