"""GPU architectures: the limits that decide what fits, and the peaks that no kernel can beat."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Target:
    """An architecture, and one device of it. Sizes in bytes; peaks as the vendor publishes them, dense.

    On NVIDIA registers and warps are those of a multiprocessor, on AMD those of one of a compute unit's four SIMDs.
    """

    backend: Literal["cuda", "hip"]
    arch: int | str
    warp_size: int
    shared_per_block: int
    shared_per_multiprocessor: int
    registers: int
    max_warps: int
    matrix_instruction: str  # regular expression
    device: str
    half_tflops: float
    float_tflops: float  # without reduced precision
    bandwidth: float  # TB/s


TARGETS = {
    "sm_80": Target("cuda", 80, 32, 163 << 10, 164 << 10, 64 << 10, 64, r"\bHMMA\b", "A100 SXM 80GB", 312, 19.5, 2.039),
    "sm_90a": Target("cuda", 90, 32, 227 << 10, 228 << 10, 64 << 10, 64, r"\bHGMMA\b", "H100 SXM", 989, 67, 3.35),
    "sm_100a": Target("cuda", 100, 32, 227 << 10, 228 << 10, 64 << 10, 64, r"\bUTC\w*MMA\b", "B200", 2250, 75, 8.0),
    "gfx942": Target("hip", "gfx942", 64, 64 << 10, 64 << 10, 512 * 64, 8, r"\bv_mfma_\w+", "MI300X", 1307, 163.4, 5.3),
}


def check_targets(targets: Iterable[str]) -> None:
    """Raise unless all of `targets` are keys of :data:`TARGETS`.

    Raises:
        ValueError: a target is not known.
    """
    unknown = sorted(set(targets) - TARGETS.keys())
    if unknown:
        raise ValueError(f"targets: expected some of {list(TARGETS)}, got {unknown}")


def occupancy(target: str, registers: int, shared_bytes: int, num_warps: int) -> int:
    """Programs of a kernel that one multiprocessor (compute unit) holds at once.

    Args:
        target: a key of :data:`TARGETS`.
        registers: per thread.
        shared_bytes: per program.
        num_warps: per program.
    """
    known = TARGETS[target]
    if known.backend == "cuda":
        # Registers are given to warps in units of 256, shared memory with 1 KiB for the system.
        per_warp = -(-registers * known.warp_size // 256) * 256
        by_warps = min(known.registers // per_warp, known.max_warps) // num_warps
        return min(by_warps, known.shared_per_multiprocessor // (shared_bytes + 1024), 32)
    per_warp = -(-registers // 8) * 8 * known.warp_size
    warps_per_simd = min(known.registers // per_warp, known.max_warps)
    by_warps = warps_per_simd * 4 // num_warps
    return min(by_warps, known.shared_per_multiprocessor // max(shared_bytes, 1))


def time_floor(target: str, flops: float, bytes_moved: float, *, half: bool) -> float:
    """Microseconds that a device of the architecture needs at its peaks: for the operations or the bytes, whichever is more."""
    known = TARGETS[target]
    return max(flops / (known.half_tflops if half else known.float_tflops), bytes_moved / known.bandwidth) / 1e6
