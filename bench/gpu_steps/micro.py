"""Times of kernels: the step `micro` of ``python -m bench.gpu``."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

import droidspeak_ops as ds
from bench import projection
from bench.gpu_steps.step import Step, summary, written
from bench.gpu_steps.times import Replay, Run, host_microseconds
from bench.providers import GROUPED, PRODUCTS, PROVIDERS, Problem, expected
from droidspeak_ops.proof.shapes import SHAPES, Shape
from droidspeak_ops.proof.targets import TARGETS

CASES = (("Llama-3-8B", 8192), ("Llama-3-8B", 32768), ("Llama-3-8B", 1024), ("Qwen3-8B", 8192))
DRY_CASES = (("Llama-3-8B", 32), ("Qwen3-8B", 16))
FIRST = ("ours folded", "ours", "concatenated", "concatenated folded")
LATER = ("compile", "transformers", "unfused", "liger")
ROTATED_BYTES = 120e6  # of input sets that take turns: more than twice the L2 cache of an H100
HOST_TOKENS = 8192  # beyond, the host is no longer what a call waits for
EPS = 1e-6


def micro(step: Step) -> None:
    """Measure each provider on each case, those that matter most first."""
    torch.manual_seed(0)
    if not step.dry:
        _warm_clocks()
    cases = [Case(step, model, tokens) for model, tokens in (DRY_CASES if step.dry else CASES)]
    for case in cases:
        for name in PRODUCTS:
            case.measure(name, PRODUCTS[name])
        for name in FIRST:
            case.measure(name, PROVIDERS[name])
    grouped = [case for case in cases if case.tokens == (DRY_CASES[0][1] if step.dry else projection.GROUP_TOKENS)]
    for case in grouped:
        of_layers = Case(step, case.model, case.tokens, projection.GROUP, cublas=case.cublas)
        for name in GROUPED:
            of_layers.measure(name, GROUPED[name])
        del of_layers
    streaming(step)
    attention(step)
    for name in LATER:
        for case in cases:
            if step.dry and name == "compile":
                step.add("provider", model=case.model, tokens=case.tokens, provider=name, check="skipped: takes long")
            else:
                case.measure(name, PROVIDERS[name])


def _warm_clocks(seconds: float = 1.0) -> None:
    a = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for _ in range(10):
            a @ a
        torch.cuda.synchronize()


class Case:
    """A model's layer at one context length: several sets of tensors that take turns, and what the first must give.

    Args:
        layers: in a call.
        cublas: the bare product of one layer, once it is there: what others are compared with.
    """

    def __init__(self, step: Step, model: str, tokens: int, layers: int = 1, cublas: Replay | None = None) -> None:
        self.step, self.model, self.tokens, self.layers = step, model, tokens, layers
        self.cublas = cublas
        first = Problem(_shape(model, step.dry), tokens, step.dtype, step.device, layers)
        self.problems = [first, *(replace(first) for _ in range(0 if step.dry else input_sets(first.bytes_moved) - 1))]
        self.wanted = [output.float() for output in expected(first)]  # rounding to float32 is far below the tolerances

    def measure(self, name: str, provider: Callable[[Problem], Run]) -> None:
        """Check a provider, unless it is a product alone, and add its row."""
        step, is_product = self.step, name in PRODUCTS
        row: dict[str, Any] = {"model": self.model, "tokens": self.tokens, "provider": name}
        if reason := projection.skipped(name, step.device):
            step.add("provider", **row, check=reason)
            return
        with step.guarded("provider", **row):
            if is_product:
                run, check = provider(self.problems[0]), "product alone"
            else:
                run, check = projection.verified(self.problems[0], provider, self.wanted)
            if run is None:
                step.add("provider", **row, check=check)
                return
            cold = projection.cold_milliseconds(run, step.device, rounds=3) / self.layers
            warm: float | None = None
            speed: float | None = None
            if not step.dry:
                try:
                    replay = Replay.of([run, *(provider(problem) for problem in self.problems[1:])])
                    if name == "cublas":
                        self.cublas = replay
                    warm = replay.median()
                    if self.cublas is not None:
                        warm, speed = replay.against(self.cublas)
                        warm, speed = warm / self.layers, 100 * speed * self.layers
                except Exception as error:  # the other time is still good
                    check = f"{check}; not replayed: {summary(error)[:200]}"
            host = host_microseconds(run, 3 if step.dry else 50) if self.tokens <= HOST_TOKENS else None
            ms, flops = warm or cold, self.problems[0].flops / self.layers
            floor = _floor_ms(self.step, flops, self.problems[0].bytes_moved / self.layers)
            step.add(
                "provider", **row, cold_ms=cold, replay_ms=warm, host_us=host, tflops=flops / ms / 1e9,
                percent_of_cublas=speed, percent_of_floor=None if floor is None else 100 * floor / ms, floor_ms=floor,
                check=check,
            )  # fmt: skip


def _shape(model: str, dry: bool) -> Shape:
    return replace(SHAPES[model], hidden_size=64, num_kv_heads=2) if dry else SHAPES[model]


def input_sets(bytes_moved: int) -> int:
    """Return how many sets of inputs take turns, so that none is in the L2 cache when its turn comes."""
    return max(round(ROTATED_BYTES / bytes_moved + 0.5), 2)


def _floor_ms(step: Step, flops: float, bytes_moved: float) -> float | None:
    """Return the time floor by the ceilings that were measured, or by the vendor's peaks where that step did not get so far."""
    tflops = written(step.folder, "ceilings", "matmul").get("tflops")
    bandwidth = written(step.folder, "ceilings", "copy").get("tb_per_s")
    target = projection.known_target(step.device)
    if target is not None:
        tflops, bandwidth = tflops or TARGETS[target].half_tflops, bandwidth or TARGETS[target].bandwidth
    return None if tflops is None or bandwidth is None else max(flops / tflops, bytes_moved / bandwidth) / 1e9


def streaming(step: Step) -> None:
    """Measure kernels that only move rows, against copies: bytes are each input read and each output written once.

    A copy of as many bytes is timed in turn with each; the rate of one of gigabytes is what no kernel beats.
    """
    shape = _shape("Llama-3-8B", step.dry)
    copy_rate = written(step.folder, "ceilings", "copy").get("tb_per_s")
    for tokens in (16,) if step.dry else (8192, 1024, 32768):
        for name, make in STREAMING.items():
            with step.guarded("streaming", kernel=name, tokens=tokens):
                run, moved = make(shape, tokens, step.dtype, step.device)
                cold, warm = projection.cold_milliseconds(run, step.device, rounds=3), None
                of_same: float | None = None
                if not step.dry:
                    sets = input_sets(moved)
                    others = [make(shape, tokens, step.dtype, step.device)[0] for _ in range(sets - 1)]
                    copies = Replay.of([_copy(moved // 2) for _ in range(sets)])
                    warm, of_same = Replay.of([run, *others]).against(copies)
                rate = moved / (warm or cold) / 1e9
                step.add(
                    "streaming", kernel=name, tokens=tokens, cold_ms=cold, replay_ms=warm, bytes=moved, tb_per_s=rate,
                    percent_of_copy=None if copy_rate is None else 100 * rate / copy_rate,
                    percent_of_same_copy=None if of_same is None else 100 * of_same,
                )  # fmt: skip


def _copy(size: int) -> Run:
    source = torch.empty(size, dtype=torch.uint8, device="cuda").fill_(7)
    return partial(torch.empty_like(source).copy_, source)


Streaming = Callable[[Shape, int, torch.dtype, str], tuple[Run, int]]
"""Returns what is timed, and the bytes that it moves, for a shape, a number of tokens, a dtype and a device."""


def _row_norm(shape: Shape, tokens: int, dtype: torch.dtype, device: str) -> tuple[Run, int]:
    x = torch.randn(tokens, shape.hidden_size, dtype=dtype, device=device)
    weight = torch.randn_like(x[0])
    return lambda: ds.ops.row_norm(x, weight, EPS), 2 * x.nbytes + weight.nbytes


def _rms_rstd(shape: Shape, tokens: int, dtype: torch.dtype, device: str) -> tuple[Run, int]:
    x = torch.randn(tokens, shape.hidden_size, dtype=dtype, device=device)
    return lambda: ds.ops.rms_rstd(x, EPS), x.nbytes + 4 * tokens


def _splice(*, rotates: bool = False, code: torch.dtype | None = None) -> Streaming:
    def make(shape: Shape, tokens: int, dtype: torch.dtype, device: str) -> tuple[Run, int]:
        size = (1, shape.num_kv_heads, tokens, shape.head_dim)
        source = [torch.randn(size, dtype=dtype, device=device) for _ in "kv"]
        caches = [torch.empty(size, dtype=code or dtype, device=device) for _ in "kv"]
        slots = torch.arange(tokens, device=device)
        options: dict[str, torch.Tensor] = {}
        if rotates:
            angles = torch.randn(tokens, shape.rotary_dim // 2, device=device)
            options = {"cos": angles.cos(), "sin": angles.sin()}
        if code is not None:
            options = {f"{name}_cache_scale": torch.empty(size[:3], device=device) for name in "kv"}
        moved = sum(tensor.nbytes for tensor in (*source, *caches, slots, *options.values()))
        return lambda: ds.ops.kv_splice(*source, *caches, slots, **options), moved

    return make


STREAMING: dict[str, Streaming] = {
    "row_norm": _row_norm,
    "rms_rstd": _rms_rstd,
    "kv_splice": _splice(),
    "kv_splice, rotated": _splice(rotates=True),
    "kv_splice, int8": _splice(code=torch.int8),
}


def attention(step: Step) -> None:
    """Measure what a suffix of 32 tokens looks at, and its attention together with 5 % of the context's tokens.

    Beside each is what torch makes of the same cache with a mask; nothing is timed that does not agree with that in float32.
    Torch repeats K and V for the query heads of each kv head, as transformers does where there is a mask.
    """
    shape = _shape("Llama-3-8B", step.dry)
    for keys in (64,) if step.dry else (8192, 1024, 32768):
        for name, make in ATTENTION.items():
            with step.guarded("attention", kernel=name, tokens=keys):
                torch.manual_seed(0)
                made = make(shape, keys, step.dtype, step.device)
                found = projection.errors([made.ours()], [made.wanted])
                check = f"max {found[0]:.1e}, RMS {found[1]:.1e}"
                if not projection.within(found, step.dtype):
                    step.add("attention", kernel=name, tokens=keys, check=f"refused: {check}")
                    continue
                cold, of_torch = (projection.cold_milliseconds(run, step.device, rounds=3) for run in made.runs)
                warm, speedup = None, of_torch / cold
                if not step.dry:
                    count = input_sets(made.bytes_moved)
                    sets = [made, *(make(shape, keys, step.dtype, step.device) for _ in range(count - 1))]
                    ours, theirs = (Replay.of(runs) for runs in zip(*(each.runs for each in sets), strict=True))
                    warm, speedup = ours.against(theirs)
                ms = warm or cold
                floor = _floor_ms(step, made.flops, made.bytes_moved)
                step.add(
                    "attention", kernel=name, tokens=keys, cold_ms=cold, replay_ms=warm, torch_cold_ms=of_torch,
                    speedup=speedup, host_us=host_microseconds(made.ours, 3 if step.dry else 50),
                    tflops=made.flops / ms / 1e9, tb_per_s=made.bytes_moved / ms / 1e9,
                    percent_of_floor=None if floor is None else 100 * floor / ms, check=check,
                )  # fmt: skip


@dataclass(frozen=True)
class Attended:
    """Two calls that give the same, what that is, and the operations and the bytes that they cannot do without."""

    ours: Callable[[], torch.Tensor]
    torch: Callable[[], torch.Tensor]
    wanted: torch.Tensor
    flops: float
    bytes_moved: int

    @property
    def runs(self) -> tuple[Run, Run]:
        """Ours and torch's."""
        return self.ours, self.torch


def _attention_peaks(shape: Shape, keys: int, dtype: torch.dtype, device: str) -> Attended:
    rows = 32
    q, k, _, slots, positions, scale = _attended(shape, rows, keys, dtype, device)
    positions += keys - rows
    unseen = torch.arange(keys, device=device) > positions[0, :, None]

    def ours() -> torch.Tensor:
        peaks = torch.zeros(1, keys, device=device)
        ds.ops.attention_peaks(q, k, slots, positions, peaks, scale=scale)
        return peaks

    def plain(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        logits = (scale * (q.transpose(1, 2) @ _repeated(k, shape).mT).float()).masked_fill(unseen, -torch.inf)
        return logits.softmax(-1).amax((1, 2))

    moved = q.nbytes + k.nbytes + slots.nbytes + 8 * keys
    return Attended(ours, partial(plain, q, k), plain(q.float(), k.float()), 2.0 * q.numel() * keys, moved)


def _attend_rows(shape: Shape, keys: int, dtype: torch.dtype, device: str) -> Attended:
    rows = 32 + keys // 20
    q, k, v, slots, positions, scale = _attended(shape, rows, keys, dtype, device)
    positions[0, -32:] += keys - rows
    positions[0, :-32] = torch.randperm(keys - 32, device=device)[: rows - 32].sort().values
    seen = torch.arange(keys, device=device) <= positions[0, :, None]

    def ours() -> torch.Tensor:
        out = torch.empty_like(q)
        ds.ops.attend_rows(q, k, v, slots, positions, out, scale=scale)
        return out

    def attended(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        attend = torch.nn.functional.scaled_dot_product_attention
        k, v = (_repeated(each, shape) for each in (k, v))
        return attend(q.transpose(1, 2), k, v, attn_mask=mask, scale=scale).transpose(1, 2)

    flops = 4.0 * shape.num_q_heads * shape.head_dim * float(seen.sum())
    moved = 2 * q.nbytes + k.nbytes + v.nbytes + slots.nbytes
    # What a model makes once for all its layers.
    added = torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, -torch.inf)
    wanted = attended(q.float(), k.float(), v.float(), seen)
    return Attended(ours, partial(attended, q, k, v, added), wanted, flops, moved)


def _attended(
    shape: Shape, rows: int, keys: int, dtype: torch.dtype, device: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, float]:
    """Return Q, K, V of one sequence in a dense cache, slots, positions of the rows from 0 on, and the scale."""
    q = torch.randn(1, rows, shape.num_q_heads, shape.head_dim, dtype=dtype, device=device)
    k, v = (torch.randn(1, shape.num_kv_heads, keys, shape.head_dim, dtype=dtype, device=device) for _ in "kv")
    places = torch.arange(keys, device=device)[None]
    return q, k, v, places, places[:, :rows].clone(), shape.head_dim**-0.5


def _repeated(rows: torch.Tensor, shape: Shape) -> torch.Tensor:
    return rows.repeat_interleave(shape.num_q_heads // shape.num_kv_heads, dim=1)


ATTENTION: dict[str, Callable[[Shape, int, torch.dtype, str], Attended]] = {
    "attention_peaks": _attention_peaks,
    "attend_rows": _attend_rows,
}
