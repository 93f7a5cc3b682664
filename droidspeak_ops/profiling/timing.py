"""Times on this machine: to the first token of full prefill and of plans, and the cost model that they give."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch

from ..context.context import SharedContext
from ..hf.decoder import Decoder
from ..hf.receiver import partial_prefill
from ..hf.sender import capture
from ..prefill.maps import Maps
from ..prefill.plan import Plan
from ..progress import bars
from .cost import CostModel, through

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SUFFIX_TOKENS = 24

T = TypeVar("T")


@torch.no_grad()
def first_token(
    receiver: Any,
    context: SharedContext,
    prompt_ids: torch.Tensor,
    plan: Plan | None,
    *,
    maps: Maps | None = None,
    tokenizer: Any = None,
    norm: Literal["hf", "folded"] = "hf",
) -> tuple[torch.Tensor, Any]:
    """Run what is timed: from having the sender's context to the first token's logits ``[B, 1, vocabulary]`` and the cache.

    `plan` is None for full prefill of `prompt_ids`, which leaves the context aside: the strongest that a transformers user
    has, with the model's own attention and logits of the last token alone.
    """
    if plan is None:
        out = receiver(prompt_ids, use_cache=True, logits_to_keep=1)
    else:
        cache = partial_prefill(
            receiver, context, plan, prompt_ids=prompt_ids, maps=maps, tokenizer=tokenizer, norm=norm
        )
        suffix_ids = prompt_ids[:, context.tokens.shape[1] :]
        out = receiver(suffix_ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return out.logits, out.past_key_values


def timed(function: Callable[[], T]) -> tuple[T, float]:
    """Return what `function` returns, and the seconds it took, work on a GPU included."""
    _synchronize()
    began = time.perf_counter()
    result = function()
    _synchronize()
    return result, time.perf_counter() - began


def measure_costs(
    receiver: PreTrainedModel,
    *,
    tokens: Sequence[int] = (256, 1024, 2048),
    rounds: int = 3,
    show_progress: bool = True,
) -> CostModel:
    """Time a model on this machine, which should do nothing else: 20 seconds for 135M parameters on two CPU cores.

    Full prefill, all layers reused and all projected are timed on random tokens, and the difference is what a layer costs.

    Args:
        receiver: the model.
        tokens: three lengths of contexts, increasing; times between them follow a polynomial.
        rounds: of which the median counts.
        show_progress: whether to draw a bar on stderr.

    Raises:
        UnsupportedModelError: the receiver's family is not supported.
        ValueError: `tokens` are not three that increase.
    """
    if len(tokens) != 3 or not 0 < tokens[0] < tokens[1] < tokens[2]:
        raise ValueError(f"tokens: got {list(tokens)}; three lengths that increase are needed")
    decoder = Decoder(receiver)
    depth, plans = decoder.num_layers, (None, Plan(), Plan(project="rest"))
    seconds: list[list[float]] = []
    with bars(show_progress) as progress:
        for length in progress.track(tokens, description="Timing"):
            ids = torch.randint(decoder.config.vocab_size, (1, length + SUFFIX_TOKENS), device=decoder.model.device)
            context = capture(receiver, ids[:, :length], layers=range(depth))
            ways = [partial(first_token, receiver, context, ids, plan) for plan in plans]
            for way in ways:
                way()
            times = [[timed(way)[1] for way in ways] for _ in range(rounds)]
            seconds.append([statistics.median(column) for column in zip(*times, strict=True)])
    full, reused, projected = zip(*seconds, strict=True)
    kv = context.kv(0)
    return CostModel(
        run=through(tokens, [(a - b) / depth for a, b in zip(full, reused, strict=True)]),
        project=through(tokens, [(a - b) / depth for a, b in zip(projected, reused, strict=True)]),
        rest=through(tokens, reused),
        hidden_bytes=context.hidden(0).nbytes // length,
        kv_bytes=(kv.keys.nbytes + kv.values.nbytes) // kv.keys.shape[2],
        machine=_machine(decoder.model),
        tokens=(tokens[0], tokens[-1]),
    )


def _machine(model: Any) -> str:
    dtype = str(model.dtype).removeprefix("torch.")
    if model.device.type == "cuda":
        return f"{torch.cuda.get_device_name(model.device)}, {dtype}, torch {torch.__version__}"
    return f"{torch.get_num_threads()} CPU threads, {platform.machine()}, {dtype}, torch {torch.__version__}"


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
