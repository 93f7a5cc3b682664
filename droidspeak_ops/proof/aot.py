"""Compile the kernels ahead of time for GPUs that need not be there, and read from the machine code what they use.

A case calls a launcher with tensors that have no contents. The launch is caught, and what is compiled is what a GPU would get:
the same constants, the same specialisation of strides and alignments, the same configuration.
"""

from __future__ import annotations

import multiprocessing
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch.utils._pytree import tree_leaves
from triton.tools.tensor_descriptor import TensorDescriptor

from ..kernels.arguments import Projection
from .machine_code import Code, read_amdgcn, read_cubin
from .shapes import SHAPES, Shape, projections
from .targets import TARGETS, check_targets, occupancy, time_floor
from .traffic import minimum

FLOOR_TOKENS = (1024, 8192, 32768)


@dataclass(frozen=True)
class Compiled(Code):
    """One kernel in one configuration for one target.

    Attributes:
        shared_bytes, shared_limit: shared memory of a program, and what the target gives one.
        occupancy: programs that a multiprocessor holds at once.
        floor_us: by tokens, the microseconds that the target's device needs at its peaks for the operations, or for every
            input read once and every output written once, whichever is more.
    """

    kernel: str
    config: str
    target: str
    shared_bytes: int
    shared_limit: int
    occupancy: int
    floor_us: dict[int, float]


@dataclass(frozen=True)
class Case:
    """A call of a launcher: `launch(target, tokens)` with tensors on the "meta" device."""

    config: str
    launch: Callable[[str, int], None]


@dataclass(frozen=True)
class Launch:
    """A kernel with the arguments and options that a launcher gave it."""

    kernel: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]


def compile_all(targets: Sequence[str]) -> Iterator[list[Compiled]]:
    """Compile every shipped configuration of every kernel for `targets`, keys of :data:`TARGETS`, on all cores.

    Gives the kernels of one case at a time, :func:`num_cases` in all.

    Raises:
        ValueError: a target is not known.
    """
    check_targets(targets)
    jobs = [(target, index) for target in targets for index in range(len(CASES))]
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(_compile_case, *zip(*jobs, strict=True))


def num_cases(targets: Sequence[str]) -> int:
    return len(targets) * len(CASES)


def _compile_case(target: str, index: int) -> list[Compiled]:
    case = CASES[index]
    floors: list[dict[int, float]] = []
    shipped: dict[str, tuple[str, Launch, dict[int, float]]] = {}
    for tokens in reversed(FLOOR_TOKENS):
        launches = caught(partial(case.launch, target, tokens))
        floors = floors or [{} for _ in launches]
        for floor, launch in zip(floors, launches, strict=True):
            floor[tokens] = round(_time_floor(target, launch), 3)
            # Fewer tokens may be launched in another configuration.
            config = case.config if tokens == FLOOR_TOKENS[-1] else f"{case.config}, {tokens} tokens"
            shipped.setdefault(f"{launch.kernel.__name__} {launch.options}", (config, launch, floor))
    return [_compile(config, target, launch, floor) for config, launch, floor in shipped.values()]


def caught(launch: Callable[[], None]) -> list[Launch]:
    """The kernel launches of a call, none of which happens."""
    from triton.runtime.jit import JITFunction

    launches: list[Launch] = []

    def run(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        inside = [leaf for argument in arguments if isinstance(argument, tuple) for leaf in tree_leaves(argument)]
        if any(isinstance(leaf, TensorDescriptor) for leaf in inside):
            raise ValueError("a tensor descriptor inside a tuple: Triton 3.6 compiles the kernel, and cannot launch it")
        launches.append(Launch(kernel, arguments, options))

    with mock.patch.object(JITFunction, "run", run):
        launch()
    if not launches:
        raise RuntimeError("no launch was caught: the kernels were imported with TRITON_INTERPRET set; unset it")
    return launches


def _compile(config: str, target: str, launch: Launch, floor_us: dict[int, float]) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    known, kernel = TARGETS[target], launch.kernel
    gpu = GPUTarget(known.backend, known.arch, known.warp_size)
    backend = make_backend(gpu)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*launch.arguments, **launch.options)
    options, signature, constants, attributes = kernel._pack_args(
        backend, launch.options, bound, specialization, options
    )
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=gpu, options=options.__dict__)
    code = (read_cubin if known.backend == "cuda" else read_amdgcn)(compiled.asm, known.matrix_instruction)
    shared = compiled.metadata.shared
    return Compiled(
        kernel=kernel.__name__,
        config=config,
        target=target,
        shared_bytes=shared,
        shared_limit=known.shared_per_block,
        occupancy=occupancy(target, code.registers, shared, compiled.metadata.num_warps),
        floor_us=floor_us,
        **vars(code),
    )


def _time_floor(target: str, launch: Launch) -> float:
    tensors: dict[int, tuple[str, torch.Tensor]] = {}  # a tensor may come as a pointer and in a descriptor
    for name, argument in zip(launch.kernel.arg_names, launch.arguments, strict=False):
        tensors.update(_tensors(name, argument))
    _, x = next(iter(tensors.values()))
    weights = [tensor for name, tensor in tensors.values() if re.fullmatch(r"[qkv](\d|_weights?)", name)]
    flops = sum(2 * x.shape[0] * weight.numel() for weight in weights)
    if products := _ATTENTION_PRODUCTS.get(launch.kernel.__name__):
        keys = next(tensor for name, tensor in tensors.values() if name == "key_slots_ptr").shape[1]
        flops = products * 2 * x.numel() * keys
    # Once more what is an input and an output in one.
    written = [x] if launch.kernel.__name__ == "_head_norm_kernel" else []
    return time_floor(
        target, flops, minimum((tensor for _, tensor in tensors.values()), written), half=x.dtype != torch.float32
    )


# Products with all keys of each query and head, which is x, where rows see them all.
_ATTENTION_PRODUCTS = {"_attention_lse_kernel": 1, "_attention_peaks_kernel": 1, "_attend_rows_kernel": 2}


def _tensors(name: str, argument: Any) -> Iterator[tuple[int, tuple[str, torch.Tensor]]]:
    """The tensors of an argument with their names: of the parameter, or of the field of a named tuple; of a tensor
    descriptor, what it describes. Each with an identity."""
    if isinstance(argument, torch.Tensor):
        yield id(argument), (name, argument)
    elif isinstance(argument, TensorDescriptor):
        yield id(argument.base), (name, argument.base.as_strided(argument.shape, argument.strides))
    elif isinstance(argument, tuple):
        for field, value in zip(getattr(argument, "_fields", [name] * len(argument)), argument, strict=True):
            yield from _tensors(field, value)


# --- what is compiled ----------------------------------------------------------------------------------------------


def _project_splice(
    shape: Shape, dtype: torch.dtype, options: dict[str, Any], target: str, tokens: int,
    *, change: Callable[[Projection], Projection] | None = None,
) -> None:  # fmt: skip
    from ..kernels.project_splice import project_splice
    from ..kernels.project_splice_config import project_splice_config, size_of

    layers = projections(shape, tokens, dtype=dtype, **options)
    if change is not None:
        layers = [change(layer) for layer in layers]
    project_splice(layers, project_splice_config(target, size_of(layers)))


def _row_norm(shape: Shape, store_rows: bool, target: str, tokens: int) -> None:
    from ..kernels.row_norm import rms_rstd, row_norm

    x, weight = _empty(tokens, shape.hidden_size), _empty(shape.hidden_size)
    if store_rows:
        row_norm([x], [weight], shape.norm_order, 1e-6, [torch.empty_like(x)])
    else:
        rms_rstd([x], 1e-6, [_empty(tokens, dtype=torch.float32)])


def _kv_splice(
    shape: Shape, source: torch.dtype, stored: torch.dtype, rotated: bool, static_scale: bool, target: str, tokens: int
) -> None:
    from ..kernels.kv_splice import kv_splice

    size = (1, shape.num_kv_heads, tokens, shape.head_dim)
    angles = [_empty(tokens, shape.rotary_dim // 2, dtype=torch.float32) for _ in range(2)] if rotated else [None, None]
    scales = [
        [_empty(*size[:3], dtype=torch.float32) if dtype.itemsize == 1 else None for _ in range(2)]
        for dtype in (source, stored)
    ]
    tensors = [[_empty(*size, dtype=dtype) for _ in range(2)] for dtype in (source, stored)]
    slots = _empty(tokens, dtype=torch.int64)
    arguments: list[Any] = [*tensors[0], *scales[0], *angles, slots, static_scale, *tensors[1], *scales[1]]
    kv_splice(*arguments)


def _attention(
    peaks: bool, shape: Shape, dtype: torch.dtype, has_window: bool, softcap: float | None, has_sinks: bool,
    target: str, tokens: int,
) -> None:  # fmt: skip
    """A suffix of 32 tokens: it looks at a cache, or attends to it together with 5 % of the context's tokens."""
    from ..kernels.attend_rows import attend_rows
    from ..kernels.attention_peaks import attention_peaks

    num_rows = 32 if peaks else 32 + tokens // 20
    q = _empty(1, num_rows, shape.num_q_heads, shape.head_dim, dtype=dtype)
    k_cache, v_cache = (_empty(1, shape.num_kv_heads, tokens + 32, shape.head_dim, dtype=dtype) for _ in "kv")
    key_slots, positions = _empty(1, tokens + 32, dtype=torch.int64), _empty(1, num_rows, dtype=torch.int64)
    sinks = _empty(shape.num_q_heads, dtype=dtype) if has_sinks else None
    options = shape.head_dim**-0.5, tokens // 8 if has_window else None, softcap, sinks
    if peaks:
        out = _empty(1, tokens + 32, dtype=torch.float32)
        attention_peaks(target, q, k_cache, key_slots, positions, out, *options)
    else:
        attend_rows(target, q, k_cache, v_cache, key_slots, positions, torch.empty_like(q), *options)


def _empty(*size: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


def _cases() -> Iterator[Case]:
    bf16, fp16, fp32, fp8, int8 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.int8
    llama = SHAPES["Llama-3-8B"]

    for model, shape in SHAPES.items():
        for name, options in (
            ("K+V", {}),
            ("Q+K+V folded", {"with_q": True, "folded": True}),
            ("K+V folded, 8 layers", {"layers": 8, "folded": True}),
        ):
            yield Case(f"{model} bf16 {name}", partial(_project_splice, shape, bf16, options))
        if model in ("Llama-3-8B", "Qwen3-8B", "Gemma-3-12B", "Phi-2"):
            yield Case(f"{model} fp32 K+V", partial(_project_splice, shape, fp32, {}))
        if shape.norm_order != "llama" or shape is llama:
            yield Case(f"{model} bf16 rows", partial(_row_norm, shape, True))
    yield Case("Llama-3-8B fp16 K+V", partial(_project_splice, llama, fp16, {}))
    yield Case("Llama-3-8B bf16 K+V, positions", partial(_project_splice, llama, bf16, {}, change=_with_positions))
    yield Case(
        "Llama-3-8B bf16 K+V to NHD pages in fp8", partial(_project_splice, llama, bf16, {}, change=_to_fp8_pages)
    )
    for layers in (2, 4):
        options = {"layers": layers, "folded": True}
        yield Case(f"Llama-3-8B bf16 K+V folded, {layers} layers", partial(_project_splice, llama, bf16, options))
    yield Case("Llama-3-8B bf16 1/rms", partial(_row_norm, llama, False))
    for source, stored, rotated, static in (
        (bf16, bf16, False, False), (bf16, bf16, True, False), (fp32, bf16, True, False),
        (bf16, fp8, False, False), (bf16, fp8, True, True), (fp8, bf16, True, False), (fp8, fp8, False, False),
        (bf16, int8, False, False), (int8, bf16, True, False), (int8, int8, True, False),
    ):  # fmt: skip
        label = f"{_short(source)} to {_short(stored)}{', rotated' * rotated}{', static' * static}"
        yield Case(f"Llama-3-8B {label}", partial(_kv_splice, llama, source, stored, rotated, static))
    for model in ("Phi-2", "Phi-3-mini", "Gemma-3-12B", "Nemotron-4-340B-TP8"):
        yield Case(f"{model} bf16 to bf16, rotated", partial(_kv_splice, SHAPES[model], bf16, bf16, True, False))
    for model, dtype, has_window, softcap, has_sinks in (
        ("Llama-3-8B", bf16, False, None, False), ("Gemma-3-12B", bf16, True, 50.0, True),
        ("Llama-3-8B", fp32, True, 50.0, True),
    ):  # fmt: skip
        variant = f"{', window' * has_window}{', softcap' * (softcap is not None)}{', sinks' * has_sinks}"
        for name, peaks in (("peaks", True), ("rows", False)):
            label = f"{model} {_short(dtype)} {name}{variant}"
            yield Case(label, partial(_attention, peaks, SHAPES[model], dtype, has_window, softcap, has_sinks))


def _with_positions(layer: Projection) -> Projection:
    return layer._replace(positions=layer.slot_mapping)


def _to_fp8_pages(layer: Projection) -> Projection:
    _, heads, tokens, width = layer.k_cache.shape
    k, v = (_empty(tokens // 16, 16, heads, width, dtype=torch.float8_e4m3fn).transpose(1, 2) for _ in "kv")
    return layer._replace(k_cache=k, v_cache=v)


def _short(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float32: "fp32", torch.float8_e4m3fn: "fp8", torch.int8: "int8"}[dtype]


CASES = list(_cases())
