"""Inputs of the operators for tests: random tensors in the shapes that the operators take, and poisoned outputs."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from droidspeak_ops import ops
from droidspeak_ops.ops import Projection, reference

OUTPUTS = ("q", "k_cache", "v_cache")


class Case(list[Projection]):
    """Layers to project together, each with outputs of its own."""

    def change(self, make: Callable[[Projection], Mapping[str, Any]] | None = None, **changes: Any) -> "Case":
        """The same layers with other values of some fields, given as they are or made for each layer."""
        return Case(layer._replace(**changes, **(make(layer) if make else {})) for layer in self)

    def without_q(self) -> "Case":
        return self.change(**dict.fromkeys(name for name in Projection._fields if name.startswith("q")))

    def tensors(self, *names: str) -> list[torch.Tensor]:
        """The tensors of some fields in all layers, field by field."""
        return [tensor for name in names for layer in self if (tensor := getattr(layer, name)) is not None]

    @property
    def outputs(self) -> list[torch.Tensor]:
        """Q of all layers, then K, then V."""
        return self.tensors(*OUTPUTS)

    @property
    def caches(self) -> list[torch.Tensor]:
        return self.tensors(*OUTPUTS[1:])

    def with_new_outputs(self) -> "Case":
        def poisoned_outputs(layer: Projection) -> dict[str, torch.Tensor]:
            return {name: poisoned_like(tensor) for name in OUTPUTS if (tensor := getattr(layer, name)) is not None}

        return self.change(poisoned_outputs)

    def written(self) -> torch.Tensor:
        """For each row of the cache, whether a token is stored there: [blocks, block_size]."""
        blocks, _, block_size, _ = self[0].k_cache.shape
        slots = self[0].slot_mapping
        mask = torch.zeros(blocks * block_size, dtype=torch.bool, device=slots.device)
        mask[slots[slots >= 0]] = True
        return mask.view(blocks, block_size)


def call(case: Case, **changes: Any) -> None:
    """`ops.kv_project` of a case of one layer, without its Q."""
    (layer,) = case.without_q()
    ops.kv_project(layer._replace(**changes))


def kv_project_ref(case: Case) -> None:
    """The reference of a case, layer by layer."""
    for layer in case:
        reference.kv_project_ref(layer)


def poisoned(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
    """NaN, or in integers the lowest one, which is no code of int8."""
    return torch.full(
        shape, float("nan") if dtype.is_floating_point else torch.iinfo(dtype).min, dtype=dtype, device=device
    )


def poisoned_like(tensor: torch.Tensor) -> torch.Tensor:
    """NaN of the same shape and strides."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device).fill_(
        float("nan")
    )


def kv_tensors(
    layout: str, blocks: int, heads: int, block_size: int, head_dim: int, dtype: torch.dtype, device: torch.device | str
) -> list[torch.Tensor]:
    """Poisoned K and V caches `[blocks, heads, block_size, head_dim]` as views of a layout."""
    if layout == "NHD":
        caches = [poisoned((blocks, block_size, heads, head_dim), dtype, device) for _ in range(2)]
        return [cache.transpose(1, 2) for cache in caches]
    if layout == "strided":  # K and V interleaved in one tensor, with room between the heads
        both = poisoned((blocks, heads + 1, block_size, 2, head_dim), dtype, device)
        return [both[:, :heads, :, 0], both[:, :heads, :, 1]]
    return [poisoned((blocks, heads, block_size, head_dim), dtype, device) for _ in range(2)]


def projection(
    *,
    tokens: int = 63,
    hidden: int = 48,
    layers: int = 1,
    q_heads: int = 0,
    kv_heads: int = 2,
    head_dim: int = 64,
    rotary_dim: int | None = None,
    dtype: torch.dtype = torch.float32,
    cache_dtype: torch.dtype | None = None,
    rstd: bool = False,
    bias: bool = False,
    head_norm: str | None = None,
    norm_order: str = "llama",
    rotary_dtype: torch.dtype | None = None,
    positions: bool = False,
    layout: str = "dense",
    scattered: bool = False,
    fused: bool = False,
    strided: bool = False,
    device: torch.device | str = "cpu",
) -> Case:
    """A random problem. `scattered` shuffles the slots, leaves gaps and skips a token; `fused` makes the weights rows of one
    tensor; `strided` puts rows in wider tensors; `head_norm` is over "each" head or over "all"."""

    def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
        wide = torch.randn(*shape[:-1], shape[-1] + (16 if strided else 0), device=device) * scale
        return wide.to(dtype)[..., : shape[-1]]

    rotary_dim = head_dim if rotary_dim is None else rotary_dim
    paged = layout in ("HND", "NHD")
    block_size = 16 if paged else tokens + 5
    blocks = -(-(tokens + 5) // block_size) if paged else 1
    slots = torch.arange(tokens)
    if scattered:
        slots = torch.randperm(blocks * block_size)[:tokens]
        slots[tokens // 2 : tokens // 2 + 1] = -1
    slots = slots.to(device)
    table = tokens + 7 if positions else tokens
    rows = torch.randint(table, (tokens,), device=device) if positions and rotary_dim else None
    sizes = [q_heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
    q_norm, k_norm = (sizes[0], sizes[1]) if head_norm == "all" else (head_dim, head_dim)

    def layer() -> Projection:
        if fused:
            q_weight, k_weight, v_weight = random(sum(sizes), hidden, scale=hidden**-0.5).split(sizes)
        else:
            q_weight, k_weight, v_weight = (random(size, hidden, scale=hidden**-0.5) for size in sizes)
        k_cache, v_cache = kv_tensors(layout, blocks, kv_heads, block_size, head_dim, cache_dtype or dtype, device)
        x = random(tokens, hidden)
        angle = torch.rand(table, rotary_dim // 2, device=device) * 6.28 if rotary_dim else None
        return Projection(
            x, k_weight, v_weight, k_cache, v_cache, slots,
            norm="folded" if rstd else "none",
            norm_order=norm_order,
            rstd=(x.float().pow(2).mean(-1) + 1e-6).rsqrt() if rstd else None,
            q_weight=q_weight if q_heads else None,
            q=poisoned((q_heads, tokens, head_dim), dtype, device).transpose(0, 1) if q_heads else None,
            q_bias=random(sizes[0]) if bias and q_heads else None,
            k_bias=random(sizes[1]) if bias else None,
            v_bias=random(sizes[2]) if bias else None,
            q_norm_weight=random(q_norm) if head_norm and q_heads else None,
            k_norm_weight=random(k_norm) if head_norm else None,
            cos=None if angle is None else angle.cos().to(rotary_dtype or dtype),
            sin=None if angle is None else angle.sin().to(rotary_dtype or dtype),
            positions=rows,
        )  # fmt: skip

    return Case(layer() for _ in range(layers))


class Attention(NamedTuple):
    """Arguments of attention over a cache, in the order of the operators."""

    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    key_slots: torch.Tensor
    positions: torch.Tensor
    scale: float
    window: int | None
    softcap: float | None
    sinks: torch.Tensor | None

    def peaks_of(self, run: Callable[..., None], peaks: torch.Tensor) -> torch.Tensor:
        """Raise `peaks` by an implementation of `attention_peaks`."""
        run(self.q, self.k_cache, self.key_slots, self.positions, peaks, *self[5:])
        return peaks

    def rows_of(self, run: Callable[..., None], out: torch.Tensor) -> torch.Tensor:
        """Write `out` by an implementation of `attend_rows`."""
        run(*self[:5], out, *self[5:])
        return out

    def new_peaks(self) -> torch.Tensor:
        return torch.zeros(self.key_slots.shape, device=self.q.device)

    def new_rows(self) -> torch.Tensor:
        return poisoned(tuple(self.q.shape), self.q.dtype, self.q.device)

    @property
    def options(self) -> dict[str, Any]:
        """The keywords of the public functions."""
        return {name: getattr(self, name) for name in self._fields[5:]}


def attention(
    *,
    batch: int = 2,
    rows: int = 7,
    keys: int = 40,
    kv_heads: int = 2,
    group: int = 2,
    head_dim: int = 16,
    dtype: torch.dtype = torch.float32,
    layout: str = "dense",
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.dtype | None = None,
    missing: bool = True,
    padding: bool = True,
    device: torch.device | str = "cpu",
) -> Attention:
    """A random problem. Rows stand anywhere among the keys, in any order and not apart; `missing` drops every fifth key, and
    `padding` makes some rows padding. What the cache holds for no key is NaN."""
    if layout == "dense":
        blocks, block_size = batch, keys + 3
        slots = torch.arange(batch)[:, None] * block_size + torch.arange(keys)
    else:
        block_size = 16
        blocks = -(-batch * keys // block_size) + 2
        slots = torch.randperm(blocks * block_size)[: batch * keys].view(batch, keys)
    if missing:
        slots[:, 2::5] = -1
    positions = torch.randint(keys, (batch, rows))
    if padding:
        positions[:, 1::4] = -1
    slots, positions = slots.to(device), positions.to(device)
    caches = kv_tensors(layout, blocks, kv_heads, block_size, head_dim, dtype, device)
    held = slots[slots >= 0]
    for cache in caches:
        values = torch.randn(len(held), kv_heads, head_dim, device=device).to(dtype)
        cache[held // block_size, :, held % block_size] = values
    heads = kv_heads * group
    # Heads before rows in memory, as a model that transposes them has it, with room between.
    q = torch.randn(batch, heads, rows + 1, head_dim + 8, device=device).to(dtype).transpose(1, 2)
    return Attention(
        q[:, :rows, :, :head_dim], *caches, slots, positions,
        scale=2 * head_dim**-0.5 if scale is None else scale,
        window=window,
        softcap=softcap,
        sinks=None if sinks is None else torch.randn(heads, device=device).to(sinks),
    )  # fmt: skip


def covering(axes: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    """Cases in which every value of each axis meets every value of each other axis, found greedily."""
    names = list(axes)
    missing = {
        frozenset({(one, a), (other, b)})
        for one, other in itertools.combinations(names, 2)
        for a, b in itertools.product(range(len(axes[one])), range(len(axes[other])))
    }
    while missing:
        case = dict(sorted(min(missing, key=sorted)))
        for name in names:
            if name not in case:
                gains = {
                    value: sum(frozenset({(name, value), chosen}) in missing for chosen in case.items())
                    for value in range(len(axes[name]))
                }
                case[name] = max(gains, key=gains.__getitem__)
        missing -= {frozenset(pair) for pair in itertools.combinations(case.items(), 2)}
        yield {name: axes[name][case[name]] for name in names}
