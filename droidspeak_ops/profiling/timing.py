"""Times to first token on this machine, of full prefill and of plans, and the cost model fitted to them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, TypeVar

import torch

from ..context.context import SharedContext
from ..hf.decoder import Decoder, PreTrainedModel
from ..hf.receiver import partial_prefill
from ..hf.sender import capture
from ..machine import environment
from ..prefill.maps import Maps
from ..prefill.plan import Plan
from ..progress import bars
from .cost import CostModel, Polynomial

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
    """Run a prompt up to its first token, over the sender's context; return the logits ``[B, 1, vocabulary]`` and the cache.

    The cache is of the prompt; of a plan that selects tokens it is without the last token. Where `plan` is None, the model
    prefills all of `prompt_ids` itself and the context is not used. This is the strongest baseline in transformers: the model's
    own attention, and logits of the last token alone.
    """
    if plan is None:
        out = receiver(prompt_ids, use_cache=True, logits_to_keep=1)
    else:
        cache = partial_prefill(
            receiver, context, plan, prompt_ids=prompt_ids, maps=maps, tokenizer=tokenizer, norm=norm
        )
        return next_logits(receiver, prompt_ids, cache), cache
    return out.logits, out.past_key_values


@torch.no_grad()
def next_logits(receiver: Any, prompt_ids: torch.Tensor, cache: Any) -> torch.Tensor:
    """Return the logits ``[B, 1, vocabulary]`` that follow a prompt, of which `cache` holds the head; the rest is run.

    Nothing is run where selected tokens have: their cache knows the logits.
    """
    known: torch.Tensor | None = getattr(cache, "next_logits", None)
    if known is not None:
        return known[:, None]
    rest = prompt_ids[:, cache.get_seq_length() :]
    logits: torch.Tensor = receiver(rest, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    return logits


def timed(function: Callable[[], T]) -> tuple[T, float]:
    """Return the result of `function` and the seconds it took, including queued GPU work."""
    synchronize()
    began = time.perf_counter()
    result = function()
    synchronize()
    return result, time.perf_counter() - began


def measure_costs(
    receiver: PreTrainedModel,
    *,
    tokens: Sequence[int] = (256, 1024, 2048),
    rounds: int = 3,
    show_progress: bool = True,
) -> CostModel:
    """Measure the cost model of a receiver on this machine, which should be idle.

    Full prefill, all layers reused and all layers projected are timed on random tokens; their differences are the cost of a
    layer. It takes 20 seconds for 135M parameters on two CPU cores.

    Args:
        receiver: the model.
        tokens: three increasing context lengths, through whose times a polynomial is fitted.
        rounds: repetitions, of which the median is taken.
        show_progress: whether to draw a progress bar on stderr.

    Raises:
        UnsupportedModelError: the receiver's family is not supported.
        ValueError: `tokens` are not three increasing lengths.
    """
    if len(tokens) != 3 or not 0 < tokens[0] < tokens[1] < tokens[2]:
        raise ValueError(f"tokens: expected three increasing lengths, got {list(tokens)}")
    decoder = Decoder(receiver)
    depth, plans = decoder.num_layers, (None, Plan(), Plan(project="rest"))
    seconds: list[list[float]] = []
    with bars(show_progress) as progress:
        for length in progress.track(tokens, description="Timing"):
            ids = torch.randint(decoder.config.vocab_size, (1, length + SUFFIX_TOKENS), device=decoder.model.device)
            context = capture(receiver, ids[:, :length], layers=range(depth))
            runs = [partial(first_token, receiver, context, ids, plan) for plan in plans]
            for warm_up in runs:
                warm_up()
            times = [[timed(run)[1] for run in runs] for _ in range(rounds)]
            seconds.append([statistics.median(column) for column in zip(*times, strict=True)])
    full, reused, projected = zip(*seconds, strict=True)
    kv = context.kv(0)
    return CostModel(
        run=Polynomial.fit(tokens, [(a - b) / depth for a, b in zip(full, reused, strict=True)]),
        project=Polynomial.fit(tokens, [(a - b) / depth for a, b in zip(projected, reused, strict=True)]),
        rest=Polynomial.fit(tokens, reused),
        hidden_bytes=context.hidden(0).nbytes // length,
        kv_bytes=(kv.keys.nbytes + kv.values.nbytes) // kv.keys.shape[2],
        machine=_machine(decoder.model),
        tokens=(tokens[0], tokens[-1]),
    )


def _machine(model: Any) -> str:
    here = environment(model.device)
    device = here["device"] if model.device.type == "cuda" else f"{here['device']}, {here['architecture']}"
    return f"{device}, {str(model.dtype).removeprefix('torch.')}, torch {here['torch']}"


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
