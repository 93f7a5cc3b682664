"""The receiver's side: fill its KV cache of a context from what a sender left, computing only what a plan asks for."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from ..context.context import SharedContext
from ..context.fingerprint import ReuseError
from ..context.kv import KV
from ..prefill.fill import fill
from ..prefill.maps import Maps
from ..prefill.plan import Plan
from ..prefill.schedule import check_pair, resolve, resolve_over
from ..prefill.weights import Norm
from ..trace import Trace
from .adapters import check_not_invoked
from .cache import MixedCache, rows_held
from .decoder import Decoder
from .filling import CacheLayers
from .passes import Pass
from .reading import Reading
from .selecting import recompute_selected


class Receiver:
    """A model that is read once and then serves many prefills: what :func:`partial_prefill` takes in place of the model.

    A plain model, too, is read at the first call only, and again when it has changed. A receiver also keeps the copies that a
    projection needs, from when they are first needed: weights with the norm's folded in (``norm="folded"``) and weights
    with LoRA adapters beside them, for each layer that is projected memory of the size of its K and V projections. And it can
    be warmed up, and waits for no GPU.

    The model must not change meanwhile. Every use checks, without a look at values, that modules, the K/V projections' weights
    and their adapters are those that were read: what was replaced, moved to another device or dtype, written to, merged,
    switched or disabled is refused with :class:`ReuseError`. An adapter that is switched back is as it was, so a model with
    several adapters has a receiver for each. Not seen are writes through ``.data``, writes in inference mode to weights made in
    it, and changes of the model's configuration.

    Args:
        model: a causal language model of a supported family, or a PEFT model around one.

    Raises:
        UnsupportedModelError: the model's family is not supported.
    """

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._decoder = Decoder(model, keeps_copies=True)
        self._reading = Reading(self._decoder)

    def decoder(self) -> Decoder:
        """Return what was read of the model.

        Raises:
            ReuseError: the model is not what it was.
        """
        self._reading.check(self._model)
        return self._decoder

    @torch.no_grad()
    def warm_up(
        self,
        plans: Sequence[Plan] | None = None,
        *,
        tokens: Sequence[int] = (256,),
        norm: Norm = "hf",
        quantized: torch.dtype | None = None,
    ) -> None:
        """Prefill contexts of zeros, so that the first request does not wait for kernels to compile and weights to be folded.

        A GPU's kernels differ by plan: by how many layers they project together, and whether any are spliced.

        Args:
            plans: those to come; None for all ways to project layers.
            tokens: lengths of contexts. One will do for kernels; a longer one also makes room in torch's memory pool.
            norm: of projections.
            quantized: the dtype of contexts in 8 bits, whose reused layers are spliced; None for contexts in full.

        Raises:
            ReuseError: the model is not what it was.
            ValueError: a plan names layers that the model does not have.
        """
        depth = self._decoder.num_layers
        if plans is None:
            plans = [Plan(project=range(count)) for count in (1, 2, 4, 8) if count < depth] + [Plan(project="rest")]
        for length in tokens:
            context = self._context_of_zeros(length)
            if quantized is not None:
                context = context.quantized(quantized)
            for plan in plans:
                partial_prefill(self, context, replace(plan, chosen_for=None), norm=norm)

    def _context_of_zeros(self, tokens: int) -> SharedContext:
        """A context in which all layers share one memory, since nothing writes to it."""
        decoder = self._decoder
        ids = torch.zeros((1, tokens), dtype=torch.int64, device=decoder.device)
        over, states = Pass(decoder, ids.shape), torch.zeros_like(decoder.embed(ids))
        rows = torch.zeros(
            (1, decoder.num_kv_heads, tokens, decoder.head_dim), dtype=decoder.dtype, device=decoder.device
        )
        held = [rows[:, :, : rows_held(tokens, window)] for window in decoder.windows]
        return SharedContext(
            tokens=ids,
            keys_values=[KV(each, each) for each in held],
            hidden_states=dict.fromkeys(range(1, decoder.num_layers), states),
            rotations=[over.rotation(layer) for layer in range(decoder.num_layers)],
            sender=decoder.fingerprint(weights=False),
        )


def partial_prefill(
    receiver: PreTrainedModel | Receiver,
    context: SharedContext,
    plan: Plan,
    *,
    prompt_ids: torch.Tensor | None = None,
    maps: Maps | None = None,
    tokenizer: Any = None,
    norm: Norm = "hf",
    trace: Trace | None = None,
) -> MixedCache:
    """Fill the receiver's KV cache of a context: bands are recomputed, projected layers projected, the rest reused.

    The receiver's suffix then runs through all its layers over this cache (paper, section 4), in one ordinary forward
    pass: ``receiver.generate(prompt_ids, past_key_values=cache)`` with the context's tokens at the head of `prompt_ids`.

    Of a context that is still being read nothing is waited for before it is used, and it is read in the order of use.

    Args:
        receiver: a model of the sender's architecture, not changed; or a :class:`Receiver` of it, which keeps copies of weights
            where they are needed, and does not wait for a GPU.
        context: what :func:`capture` made.
        plan: which layers to recompute and project, and how many tokens to select.
        prompt_ids: ``[B, N]``, the prompt that is to follow; checked to continue the context. A plan that selects tokens needs
            it.
        maps: what :func:`fit` made of this pair. A layer that the plan projects is then filled as its choice says: projected
            with fitted weights, with the receiver's own, or reused; and bands start from corrected hidden states. For a
            context unlike those that the maps were fitted to, all those layers are reused, with a warning.
        tokenizer: the receiver's tokenizer, compared with the sender's if that was given to :func:`capture`.
        norm: ``"hf"`` for transformers' rounding order, in which recomputing all layers is bitwise the receiver's own
            prefill on the CPU in float32; ``"folded"`` for one rounding fewer (see :func:`droidspeak_ops.ops.kv_project`).
        trace: takes the spans of reading the context and of filling the cache, to see what overlapped.

    On a GPU nothing waits for the device if a :class:`Receiver` is given (reading a model reads its frequencies), unless
    `prompt_ids` or `maps` are given, whose checks read values, the model's RoPE depends on the length (``"dynamic"``,
    ``"longrope"``), or a layer with experts runs. So it can be captured in a CUDA graph, if attention is SDPA; call it once
    beforehand, as kernels compile at their first launch::

        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            cache = ds.partial_prefill(receiver, context, plan)

    ``graph.replay()`` fills this `cache` from this `context` again: write another context of as many tokens into its tensors
    (tokens, K, V, hidden states) before it, and run suffixes over ``copy.deepcopy(cache)``, as a replay does not take back what
    was appended. No check runs in a replay, of the receiver or of what was written.

    Returns:
        A transformers cache of T tokens. Reused layers share the context's tensors until something is appended. Of a plan that
        selects tokens it is a cache of the prompt without its last token, and its `next_logits` are those that follow that:
        ``generate`` goes on from either.

    Raises:
        ReuseError: sender and receiver do not fit, hidden states are missing, the maps are those of another pair, a profile
            chose the plan for another pair or other maps, the prompt does not continue the context, or an activated LoRA is
            invoked in it.
        UnsupportedModelError: the receiver's family is not supported.
        ValueError: the plan names layers that the receiver does not have, it selects tokens and there is no prompt, or `norm`
            is none of the two.
    """
    return prefill(
        receiver, context, plan, prompt_ids, maps, tokenizer, norm, runs_suffix=bool(plan.select), trace=trace
    )


@torch.no_grad()
def prefill(
    receiver: PreTrainedModel | Receiver,
    context: SharedContext,
    plan: Plan,
    prompt_ids: torch.Tensor | None,
    maps: Maps | None,
    tokenizer: Any,
    norm: Norm,
    *,
    runs_suffix: bool,
    compares: bool = False,
    trace: Trace | None = None,
) -> MixedCache:
    """:func:`partial_prefill`; with `runs_suffix` the suffix has run behind the context, whether tokens are selected or not.

    With `compares` the cache says how far its selected tokens were from the receiver's.
    """
    decoder = decoder_of(receiver)
    resolve(plan, decoder.num_layers)  # which names layers that the model does not have, before anything is hashed
    if norm not in ("hf", "folded"):
        raise ValueError(f"norm: expected 'hf' or 'folded', got {norm!r}")
    of_pair = maps is not None or plan.chosen_for is not None
    ours = decoder.fingerprint(tokenizer, weights=of_pair, like=context.sender)
    check_pair(plan, maps, context.sender, ours)
    known = ours.architecture["vocab_size"]
    if context.sender.architecture["vocab_size"] > known and (largest := int(context.tokens.max())) >= known:
        raise ReuseError(
            f"context: expected tokens up to {known - 1}, the end of the receiver's vocabulary, got {largest}"
        )
    if context.tokens.device != decoder.device:
        raise ReuseError(
            f"context: expected it on {decoder.device}, the receiver's device, got {context.tokens.device}"
        )
    # The warning is of the caller of whatever calls this, which torch.no_grad wraps.
    schedule = resolve_over(plan, context, maps, stacklevel=4)
    if prompt_ids is not None:
        context.check_prompt(prompt_ids)
    elif runs_suffix:
        raise ValueError("prompt_ids: expected the context and a suffix, by which the plan selects tokens, got None")
    check_not_invoked(
        decoder.model, context.tokens if prompt_ids is None else prompt_ids, tokens=context.tokens.shape[1]
    )

    layers = CacheLayers(decoder, context.tokens)
    rerotates = decoder.rope_varies or context.sender.rope != ours.rope
    used = None if maps is None else maps.used_by(plan)
    fill(schedule, layers, context, maps=used, norm=norm, rerotates=rerotates, trace=trace)
    if not runs_suffix or prompt_ids is None:
        return layers.cache
    return recompute_selected(decoder, layers.cache, schedule, prompt_ids, compares=compares)


_read: weakref.WeakKeyDictionary[Any, tuple[Decoder, Reading]] = weakref.WeakKeyDictionary()


def decoder_of(receiver: PreTrainedModel | Receiver) -> Decoder:
    """Return what is read of a model: now, when it was last given and has not changed since, or when its Receiver was made.

    Raises:
        ReuseError: the model is not what it was when its :class:`Receiver` was made.
        UnsupportedModelError: the model's family is not supported.
    """
    if isinstance(receiver, Receiver):
        return receiver.decoder()
    known = _read.get(receiver)
    if known is not None:
        decoder, reading = known
        with contextlib.suppress(ReuseError):
            reading.check(receiver)
            if decoder.rope_is_as_read():
                return decoder
    decoder = Decoder(receiver)
    _read[receiver] = decoder, Reading(decoder)
    return decoder
