"""Inputs of the operators for tests: random tensors in the shapes that the operators take, and poisoned outputs."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from droidspeak_ops import ops

OUTPUTS = ("q", "k_cache", "v_cache")


@dataclass
class Projection:
    """Arguments of `torch.ops.droidspeak_ops.kv_project`, in order, and which slots they write."""

    arguments: dict[str, Any]

    @property
    def outputs(self) -> list[torch.Tensor]:
        """Q of all layers, then K, then V."""
        return [tensor for name in OUTPUTS for tensor in self.arguments[name]]

    @property
    def caches(self) -> list[torch.Tensor]:
        return [tensor for name in OUTPUTS[1:] for tensor in self.arguments[name]]

    def with_new_outputs(self) -> "Projection":
        return Projection({
            **self.arguments, **{name: [poisoned_like(tensor) for tensor in self.arguments[name]] for name in OUTPUTS}
        })  # fmt: skip

    def written(self) -> torch.Tensor:
        """For each row of the cache, whether a token is stored there: [blocks, block_size]."""
        blocks, _, block_size, _ = self.arguments["k_cache"][0].shape
        slots = self.arguments["slot_mapping"]
        mask = torch.zeros(blocks * block_size, dtype=torch.bool, device=slots.device)
        mask[slots[slots >= 0]] = True
        return mask.view(blocks, block_size)

    def public(self, **changes: Any) -> dict[str, Any]:
        """As keyword arguments of `ops.kv_project` for a case of one layer, with rows taken as they are."""
        rename = {"x": "hidden_states"}
        names = {rename.get(name, name): value for name, value in self.arguments.items() if not name.startswith("q")}
        single = {name: (value or [None])[0] if isinstance(value, list) else value for name, value in names.items()}
        return {**single, "norm": "none", **changes}


def call(case: Projection, **changes: Any) -> None:
    """`ops.kv_project` with the arguments of a case."""
    ops.kv_project(**case.public(**changes))


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
) -> Projection:
    """A random problem. `scattered` shuffles the slots, leaves gaps and skips a token; `fused` makes the weights rows of one
    tensor; `strided` puts rows in wider tensors; `head_norm` is over "each" head or over "all"."""

    def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
        wide = torch.randn(*shape[:-1], shape[-1] + (16 if strided else 0), device=device) * scale
        return wide.to(dtype)[..., : shape[-1]]

    def of_layers(make: Any, given: bool = True) -> list[torch.Tensor]:
        return [make() for _ in range(layers)] if given else []

    rotary_dim = head_dim if rotary_dim is None else rotary_dim
    paged = layout in ("HND", "NHD")
    block_size = 16 if paged else tokens + 5
    blocks = -(-(tokens + 5) // block_size) if paged else 1
    slots = torch.arange(tokens)
    if scattered:
        slots = torch.randperm(blocks * block_size)[:tokens]
        slots[tokens // 2 : tokens // 2 + 1] = -1
    caches = [
        kv_tensors(layout, blocks, kv_heads, block_size, head_dim, cache_dtype or dtype, device) for _ in range(layers)
    ]
    table = tokens + 7 if positions else tokens
    angles = of_layers(lambda: torch.rand(table, rotary_dim // 2, device=device) * 6.28, rotary_dim > 0)
    sizes = [q_heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
    if fused:
        weights = [random(sum(sizes), hidden, scale=hidden**-0.5).split(sizes) for _ in range(layers)]
    else:
        weights = [tuple(random(rows, hidden, scale=hidden**-0.5) for rows in sizes) for _ in range(layers)]
    normed = {"each": (head_dim, head_dim), "all": (sizes[0], sizes[1]), None: (0, 0)}[head_norm]
    x = of_layers(lambda: random(tokens, hidden))
    return Projection(
        {
            "x": x,
            "rstd": [(rows.float().pow(2).mean(-1) + 1e-6).rsqrt() for rows in x] if rstd else [],
            "q_weight": [weight[0] for weight in weights] if q_heads else [],
            "k_weight": [weight[1] for weight in weights],
            "v_weight": [weight[2] for weight in weights],
            "q_bias": of_layers(lambda: random(sizes[0]), bias and q_heads > 0),
            "k_bias": of_layers(lambda: random(sizes[1]), bias),
            "v_bias": of_layers(lambda: random(sizes[2]), bias),
            "q_norm_weight": of_layers(lambda: random(normed[0]), head_norm is not None and q_heads > 0),
            "k_norm_weight": of_layers(lambda: random(normed[1]), head_norm is not None),
            "norm_order": norm_order,
            "head_norm_eps": 1e-6,
            "cos": [angle.cos().to(rotary_dtype or dtype) for angle in angles],
            "sin": [angle.sin().to(rotary_dtype or dtype) for angle in angles],
            "positions": torch.randint(table, (tokens,), device=device) if positions and rotary_dim else None,
            "slot_mapping": slots.to(device),
            "q": of_layers(lambda: poisoned((q_heads, tokens, head_dim), dtype, device).transpose(0, 1), q_heads > 0),
            "k_cache": [pair[0] for pair in caches],
            "v_cache": [pair[1] for pair in caches],
        }
    )


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
