"""Compile the kernels ahead of time for GPUs that need not be there, and read from the machine code what they use."""

from __future__ import annotations

import multiprocessing
import operator
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch


@dataclass(frozen=True)
class Target:
    """A GPU architecture: what Triton calls it, shared memory of a block, and what its matrix instructions look like."""

    backend: Literal["cuda", "hip"]
    arch: int | str
    warp_size: int
    shared_limit: int  # bytes
    matrix_instruction: str  # regular expression


TARGETS = {
    "sm_80": Target("cuda", 80, 32, 163 << 10, r"\bHMMA\b"),
    "sm_90a": Target("cuda", 90, 32, 227 << 10, r"\bHGMMA\b"),
    "sm_100a": Target("cuda", 100, 32, 227 << 10, r"\bUTC\w*MMA\b"),
    "gfx942": Target("hip", "gfx942", 64, 64 << 10, r"\bv_mfma_\w+"),
}


@dataclass(frozen=True)
class Shape:
    """What of a model a kernel is specialised for."""

    hidden_size: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    has_bias: bool = False
    has_k_norm: bool = False


SHAPES = {
    "Llama-3-8B": Shape(4096, 8, 128, 128),
    "Qwen2.5-7B": Shape(3584, 4, 128, 128, has_bias=True),
    "Qwen3-8B": Shape(4096, 8, 128, 128, has_k_norm=True),
    "Gemma-3-12B": Shape(3840, 8, 256, 256, has_k_norm=True),
    "Phi-2": Shape(2560, 32, 80, 32, has_bias=True),
    "Phi-3-mini": Shape(3072, 32, 96, 96),
    "SmolLM2-135M": Shape(576, 3, 64, 64),
}


@dataclass(frozen=True)
class Compiled:
    """One kernel in one configuration for one target. Sizes in bytes; `spills` counts what does not fit in registers."""

    kernel: str
    config: str
    target: str
    registers: int
    spills: int
    shared_bytes: int
    shared_limit: int
    matrix_instructions: int
    async_copies: int


def compile_all(targets: Sequence[str]) -> Iterator[Compiled]:
    """Compile every shipped configuration of every kernel for `targets`, keys of :data:`TARGETS`, on all cores.

    Raises:
        ValueError: a target is not known.
    """
    check_targets(targets)
    jobs = [job for target in targets for job in _jobs(target)]
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(operator.call, jobs)


def check_targets(targets: Sequence[str]) -> None:
    """Raise unless all of `targets` are keys of :data:`TARGETS`.

    Raises:
        ValueError: a target is not known.
    """
    unknown = sorted(set(targets) - TARGETS.keys())
    if unknown:
        raise ValueError(f"targets: got {unknown}; some of {list(TARGETS)} are needed")


def num_configurations(targets: Sequence[str]) -> int:
    """How many results :func:`compile_all` gives."""
    return sum(len(_jobs(target)) for target in targets)


def _jobs(target: str) -> list[Callable[[], Compiled]]:
    llama = SHAPES["Llama-3-8B"]
    return [
        *(
            partial(compile_project_splice, target, model, shape, torch.bfloat16, norm)
            for model, shape in SHAPES.items()
            for norm in ("hf", "folded")
        ),
        *(
            partial(compile_project_splice, target, "Llama-3-8B", llama, dtype, "folded")
            for dtype in (torch.float16, torch.float32)
        ),
        *(partial(compile_row_norm, target, llama.hidden_size, store_rows) for store_rows in (True, False)),
        *(partial(compile_kv_splice, target, llama.head_dim, rotary_dim) for rotary_dim in (0, llama.head_dim)),
    ]


def compile_project_splice(target: str, model: str, shape: Shape, dtype: torch.dtype, norm: str) -> Compiled:
    """Compile `_project_splice_kernel` in the configuration that a launch on `target` would choose."""
    from .kernels import project_splice as module

    config = module.project_splice_config(target, dtype, shape.num_kv_heads, shape.head_dim, shape.has_k_norm)
    constants = module.project_splice_constants(
        config,
        hidden_size=shape.hidden_size,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        rotary_dim=shape.rotary_dim,
        has_rstd=norm == "folded",
        has_bias=shape.has_bias,
        has_k_norm=shape.has_k_norm,
    )
    label = f"{model} {_name(dtype)} {norm}"
    return _compile(
        module._project_splice_kernel, label, target, dtype, constants,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def compile_row_norm(target: str, hidden_size: int, store_rows: bool) -> Compiled:
    """Compile `_row_norm_kernel` for normalised rows, or for 1/rms alone; `hidden_size` is a power of two."""
    from .kernels import row_norm as module

    constants = {"STORE_ROWS": store_rows, "BLOCK_C": hidden_size}
    label = f"{hidden_size} bfloat16 {'rows' if store_rows else 'rstd'}"
    warps = module.num_warps(hidden_size)
    return _compile(module._row_norm_kernel, label, target, torch.bfloat16, constants, num_warps=warps)


def compile_kv_splice(target: str, head_dim: int, rotary_dim: int) -> Compiled:
    """Compile `_kv_splice_kernel`, copying or also rotating; `head_dim` is a power of two."""
    from .kernels import kv_splice as module

    constants = {"HEAD_DIM": head_dim, "ROTARY_DIM": rotary_dim, "BLOCK_T": module.BLOCK_T, "BLOCK_D": head_dim}
    label = f"{head_dim} bfloat16 {'rotated' if rotary_dim else 'copied'}"
    return _compile(module._kv_splice_kernel, label, target, torch.bfloat16, constants, num_warps=module.NUM_WARPS)


_POINTER_DTYPES = {"rstd_ptr": "fp32", "slot_mapping_ptr": "i64"}
_SCALARS = {"eps": "fp32", "k_norm_eps": "fp32"}


def _compile(
    kernel: Any, label: str, target: str, dtype: torch.dtype, constants: Mapping[str, Any], **options: int
) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if not hasattr(kernel, "cache_key"):
        raise RuntimeError("the kernels were imported with TRITON_INTERPRET set; unset it to compile them")
    value_type = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = f"*{_POINTER_DTYPES.get(name, value_type)}"
        else:
            signature[name] = _SCALARS.get(name, "i32")
        # What a launch finds out about tensors from torch's allocator: without it no load is wide or asynchronous.
        if name.endswith("_ptr") or name.startswith("stride_") or name == "hidden_size":
            attributes[(index,)] = [["tt.divisibility", 16]]
    known = TARGETS[target]
    source = ASTSource(kernel, signature, dict(constants), attributes)
    gpu = GPUTarget(known.backend, known.arch, known.warp_size)
    compiled = triton.compile(source, target=gpu, options={**options, "enable_fp_fusion": False})
    read = _read_cubin if known.backend == "cuda" else _read_amdgcn
    code, registers, spills = read(compiled.asm)
    return Compiled(
        kernel=kernel.__name__,
        config=label,
        target=target,
        registers=registers,
        spills=spills,
        shared_bytes=compiled.metadata.shared,
        shared_limit=known.shared_limit,
        matrix_instructions=len(re.findall(known.matrix_instruction, code)),
        async_copies=len(re.findall(r"\b(?:LDGSTS|UBLKCP|UTMALDG)\b", code)),
    )


def _read_cubin(asm: Mapping[str, Any]) -> tuple[str, int, int]:
    """SASS, registers per thread, and local loads and stores, with the tools that Triton ships."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        usage = _output(knobs.nvidia.cuobjdump.path, "-res-usage", file.name)
        code = _output(knobs.nvidia.nvdisasm.path, "-c", file.name)
    registers = re.search(r"REG:(\d+)", usage)
    if registers is None:
        raise RuntimeError(f"cuobjdump printed no register count: {usage}")
    return code, int(registers[1]), len(re.findall(r"\b(?:LDL|STL)\b", code))


def _read_amdgcn(asm: Mapping[str, Any]) -> tuple[str, int, int]:
    code = asm["amdgcn"]
    counts = {name: int(number) for name, number in re.findall(r"\.(\w+_count):\s*(\d+)", code)}
    return code, counts["vgpr_count"], counts["vgpr_spill_count"] + counts["sgpr_spill_count"]


def _output(tool: str, *arguments: str) -> str:
    return subprocess.run([tool, *arguments], check=True, capture_output=True, text=True).stdout


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
