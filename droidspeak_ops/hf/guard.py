"""A model's own passes over a mixed cache, put right where generation gets them wrong, or refused.

A transformers cache does not know which tokens it stands for, a :class:`MixedCache` does. So that every pass over one is
looked at, whoever makes it, one hook stands on the model's decoder from when a cache is first filled for it. It keeps nothing:
all that it goes by is in the pass, so that requests of several threads do not meet in it. Passes over other caches are let by.
"""

from __future__ import annotations

import threading
from functools import partial
from typing import Any

import torch

from ..context.context import is_capturing
from ..context.fingerprint import ReuseError
from .adapters import active_adapters, first_adapted
from .cache import MixedCache

_NAMES = ("past_key_values", "cache")  # of the argument: another one from transformers 5.24 on
_lock = threading.Lock()


def watch(base_model: torch.nn.Module) -> None:
    """Look at the passes of a decoder over mixed caches from now on."""
    if check_pass not in base_model._forward_pre_hooks.values():
        with _lock:
            if check_pass not in base_model._forward_pre_hooks.values():
                base_model.register_forward_pre_hook(check_pass, with_kwargs=True)


def check_pass(
    base_model: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
) -> tuple[Any, dict[str, Any]] | None:
    """Return what a pass over a mixed cache should be given, if that is something else than what it is given.

    - Tokens that the cache holds do not run again: the first step of assisted generation, and prefill in chunks
      (``prefill_chunk_size``), run the prompt from its start.
    - The mask shows the tokens of the context and hides its padding, whatever :meth:`generate` made of padding ids among them,
      and positions follow.

    Raises:
        ReuseError: the tokens are not those that the cache stands for, the mask hides tokens of the context, other adapters
            are active than those that the cache was filled with, or the prompt goes beyond where a LongRoPE changes.
    """
    if kwargs is None:  # torch adds a hook first, and then that it takes them: a pass of another thread came between
        return None
    name = next((name for name in _NAMES if isinstance(kwargs.get(name), MixedCache)), None)
    if name is None or torch.compiler.is_compiling() or is_capturing(kwargs[name].tokens.device):
        return None
    cache = kwargs[name].stands_for or kwargs[name]
    try:
        _check_adapters(base_model, cache)
        return _right(base_model, args, kwargs, name, cache)
    except ReuseError:
        _end_adapter_names(cache)
        raise


def _right(
    base_model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str, cache: MixedCache
) -> tuple[Any, dict[str, Any]]:
    """Arguments of a pass over `cache`, which is the argument `name` of it."""
    given = {**kwargs, name: cache}
    mask, rows = kwargs.get("attention_mask"), kwargs.get("inputs_embeds")
    if args or (mask is not None and not (isinstance(mask, torch.Tensor) and mask.dim() == 2)):
        return args, given  # by somebody who calls the decoder itself, or knows its rows
    held = int(cache.get_seq_length())
    if rows is None:
        new = _cut_held(cache, held, given)
        if new == 0:
            # Prefill in chunks, which does not look at what comes of this one. Whoever does shall see that it is nothing.
            embeddings = base_model.get_input_embeddings().weight
            shape = len(kwargs["input_ids"]), 1, embeddings.shape[1]
            nothing = torch.full(shape, torch.nan, dtype=embeddings.dtype, device=embeddings.device)
            return args, {
                **given, name: cache.stand_in(), "input_ids": None, "inputs_embeds": nothing, "attention_mask": None,
                "position_ids": None,
            }  # fmt: skip
        rows = given["input_ids"]
    total, changes_at = held + rows.shape[1], cache.rope_changes_at
    if changes_at is not None and held <= changes_at < total:
        raise ReuseError(
            f"prompt: expected up to {changes_at} tokens, beyond which the model's RoPE is another than the one in the cache, "
            f"got {total}; read it all anew, without a cache"
        )
    if rows.shape[0] == cache.tokens.shape[0]:
        _mend_mask(cache, min(held, cache.tokens.shape[1]), (rows.shape[1], total), given)
    return args, given


def _cut_held(cache: MixedCache, held: int, given: dict[str, Any]) -> int:
    """Leave out the tokens that the cache holds, and return the number of those that are new.

    The mask is of all tokens up to the last, and so says where these begin; without one positions do.
    """
    ids, mask, positions = given["input_ids"], given.get("attention_mask"), given.get("position_ids")
    count = ids.shape[1]
    if mask is not None:
        first = mask.shape[1] - count
    elif positions is not None and cache.mask is None and count:
        first = int(positions[..., 0].min())
    else:
        return count
    if not 0 <= first < held:
        return count
    expected = cache.tokens[:, first : first + count]
    differs = ids[:, : expected.shape[1]] != expected
    if cache.mask is not None:
        differs &= cache.mask[:, first : first + count].bool()
    if bool(differs.any()):
        at = first + int(differs.any(0).nonzero()[0])
        raise ReuseError(
            f"input_ids: expected new tokens behind the {held} in the cache, with an attention_mask of both and positions that "
            f"go on, or the same tokens from {first} on, got another at {at}"
        )
    given["input_ids"] = ids[:, held - first :]
    if positions is not None:
        given["position_ids"] = positions[..., held - first :]
    return max(count - (held - first), 0)


def _mend_mask(cache: MixedCache, known: int, of: tuple[int, int], given: dict[str, Any]) -> None:
    """Have the mask show the context's tokens and hide its padding, and positions follow.

    Args:
        known: the tokens of the context that the cache holds.
        of: the number of new tokens, and of all.
    """
    mask, own, (new, total) = given.get("attention_mask"), cache.mask, of
    if mask is None:
        if own is None:
            return
        mask = own.new_ones((own.shape[0], total))
    shown = torch.ones_like(mask[:, :known]) if own is None else own[:, :known].to(mask.dtype)
    if torch.equal(mask[:, :known], shown):
        return
    # Where it is given none, generate hides whatever has the id of padding.
    wrong = (mask[:, :known] == 0) & (shown != 0) & (cache.tokens[:, :known] != cache.padding_id)
    if bool(wrong.any()):
        raise ReuseError(
            "attention_mask: expected 1 at every token of the context, whose K/V are those of all its tokens, got 0 at "
            f"{int(wrong.any(0).nonzero()[0])}"
        )
    given["attention_mask"] = mask = torch.cat((shown, mask[:, known:]), 1)
    positions = (mask.long().cumsum(-1) - 1).masked_fill(mask == 0, 0)
    given["position_ids"] = positions[:, total - new :]


def _check_adapters(base_model: Any, cache: MixedCache) -> None:
    """Raise unless a pass runs with the adapters that the cache was filled with, in every row."""
    if cache.adapters is None or (adapted := first_adapted(base_model)) is None:
        return
    filled_with, rows = list(cache.adapters), _adapters_of_rows(adapted)
    if rows is None:
        if (active := active_adapters(adapted)) != filled_with:
            raise ReuseError(
                f"receiver: expected the adapters {filled_with}, with which the cache was filled, got {active} active"
            )
    elif any([each] != (filled_with or ["__base__"]) for each in rows):
        raise ReuseError(
            f"adapter_names: expected {filled_with or ['__base__']} in every row, with which the cache was filled, got "
            f"{list(rows)}; fill and continue a cache for each adapter"
        )


def _adapters_of_rows(module: Any) -> list[str] | None:
    """The adapter of each row (``adapter_names=``), which PEFT hands to its layers by hooks for the time of a call."""
    return next((hook.keywords["adapter_names"] for hook in _names_hooks(module).values()), None)


def _names_hooks(module: Any) -> dict[int, Any]:
    hooks = module._forward_pre_hooks.items()
    return {number: hook for number, hook in hooks if isinstance(hook, partial) and "adapter_names" in hook.keywords}


def _end_adapter_names(cache: MixedCache) -> None:
    """Take PEFT's hooks of a call off the model: of one that fails they would stay, and choose adapters for all that follow."""
    if cache.adapters is None:
        return
    for module in cache.receiver.modules():
        for number in _names_hooks(module):
            del module._forward_pre_hooks[number]
            module._forward_pre_hooks_with_kwargs.pop(number, None)
