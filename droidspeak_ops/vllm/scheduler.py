"""The scheduler's half: which requests reuse which context, isolated from all others, and which contexts are captured."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.logger import init_logger

from ..context.fingerprint import Fingerprint
from ..context.keys import identity
from ..hf.decoder import Decoder
from ..hf.pretrained import load_pretrained
from ..prefill.maps import Maps
from ..prefill.plan import Plan
from ..prefill.schedule import check_pair, resolve
from .counters import Counts
from .messages import Chunk, Load, Work
from .settings import REQUEST, Asked, Settings
from .waiting import within

logger = init_logger(__name__)


@dataclass(frozen=True)
class Match:
    """A stored context that a request reuses.

    Args:
        salt: of the request's pages, which no other contents have.
        length: of the context.
        stop: the tokens whose pages it fills: whole blocks.
    """

    salt: str
    sender: Fingerprint
    sender_name: str
    plan: Plan
    length: int
    stop: int


class Scheduling:
    """The scheduler's half of the connector.

    A request whose wish cannot be met runs as it is, with vLLM's own prefill, and its output says why.

    Args:
        config: of the engine.
        settings: of the connector.
        block_size: tokens of a page.

    Raises:
        ValueError, OSError: a model, plan or file of maps that the settings name cannot be read, or they do not fit.
    """

    def __init__(self, config: VllmConfig, settings: Settings, block_size: int) -> None:
        transfer, dtype = config.kv_transfer_config, config.model_config.dtype
        self._captures, self._reuses, self._block_size = transfer.is_kv_producer, transfer.is_kv_consumer, block_size
        self._settings, self._store = settings, settings.open_store()
        self._own = _fingerprint(config.model_config.model, dtype)
        self._plans = settings.read_plans()
        self._senders = {name: _fingerprint(each.model, dtype) for name, each in settings.senders.items()}
        self._maps = {name: Maps.load(each.maps) for name, each in settings.senders.items() if each.maps}
        for name, sender in self._senders.items():
            check_pair(Plan(), self._maps.get(name), sender, self._own)

        self._matches: dict[str, Match] = {}
        self._captured: dict[str, list[int]] = {}
        self._load: Load | None = None
        self._filled: dict[str, set[int]] = {}
        self._failed: set[str] = set()
        self._refused: dict[str, str] = {}
        self._waiting: set[str] = set()
        self.counts = Counts()

    def add(self, request: Any) -> None:
        """Decide what a new request reuses, and isolate its pages; or that it is captured."""
        try:
            asked = Asked.by(request.kv_transfer_params)
            if asked is not None and asked.capture:
                self._capture(request, asked)
            elif asked is not None and self._reuses:
                self._match(request, asked)
        except (ValueError, OSError, ImportError) as error:  # ReuseErrors among them
            logger.warning("%s runs as it is: %s", request.request_id, error)
            self._refused[request.request_id] = str(error)
            self.counts.add("refused_requests", 1)
        self._waiting.add(request.request_id)

    def _match(self, request: Any, asked: Asked) -> None:
        plan = asked.plan_among(self._plans, self._settings.default_plan(len(self._waiting)))
        if plan is None or not self._senders:
            return
        _check_plain(request)
        if request.skip_reading_prefix_cache:
            raise ValueError(
                "request: expected one that may read cached tokens, got skip_reading_prefix_cache or prompt logprobs"
            )
        name = next(iter(self._senders)) if asked.sender is None else asked.sender
        if name not in self._senders:
            raise ValueError(f"kv_transfer_params: expected a sender among {sorted(self._senders)}, got {name!r}")
        sender, maps = self._senders[name], self._maps.get(name)
        check_pair(plan, maps, sender, self._own)
        prompt = self._head(request, asked)
        if prompt is None:
            return
        (context,) = within(self._settings.read_seconds, [partial(self._store.find, torch.tensor([prompt]), sender)])
        if context is None:
            return
        context.check_hidden(resolve(plan, context.num_layers, maps, context.hidden_layers).hidden_layers)
        length = context.tokens.shape[1]
        stop = length // self._block_size * self._block_size
        if not stop:
            return
        # Which tokens are selected the suffix says, so that their pages are for this prompt alone.
        selecting = list(request.prompt_token_ids) if plan.select else None
        mixed = [request.cache_salt, identity(sender), plan.to_json(), maps and maps.digest(), length, selecting]
        salt = "droidspeak " + hashlib.sha256(json.dumps(mixed).encode()).hexdigest()
        # Pages of mixed K and V must never be taken for the receiver's own, or for those of another mixture.
        request.cache_salt = salt
        request.block_hashes.clear()
        request.update_block_hashes()
        self._matches[request.request_id] = Match(salt, sender, name, plan, length, stop)

    def _capture(self, request: Any, asked: Asked) -> None:
        if not self._captures:
            raise ValueError("kv_role: expected kv_producer or kv_both, to capture contexts, got kv_consumer")
        _check_plain(request)
        # Of cached tokens no hidden states would be computed.
        request.skip_reading_prefix_cache = True
        self._captured[request.request_id] = list(request.prompt_token_ids[: asked.prefix_tokens])

    def _head(self, request: Any, asked: Asked) -> list[int] | None:
        """The tokens of the longest context that could fill whole blocks of a prompt, and the one that follows."""
        most = request.num_prompt_tokens - 1
        if asked.prefix_tokens is not None:
            most = min(most, asked.prefix_tokens)
        return list(request.prompt_token_ids[: most + 1]) if most >= self._block_size else None

    def matched(self, request: Any, computed: int) -> int | None:
        """Return how many tokens behind those that are cached already a context fills.

        None has a request asked about again in the next step: a step fills the pages of one, whose first token would be late if
        it waited for the contexts of others.
        """
        match = self._matches.get(request.request_id)
        if match is None or request.request_id in self._failed or request.cache_salt != match.salt:
            return 0
        tokens = max(0, match.stop - computed)
        return None if tokens and self._load else tokens

    def allocated(self, request: Any, blocks: Any, tokens: int) -> None:
        """Have a context fill the pages that a request was given."""
        if not tokens:
            return
        match = self._matches[request.request_id]
        held = list(blocks.get_block_ids()[0][: match.stop // self._block_size])
        prompt = list(request.prompt_token_ids[: None if match.plan.select else match.length + 1])
        self._load = Load(
            request.request_id, prompt, match.length, match.sender, match.sender_name,
            match.plan, match.sender.rope != self._own.rope, match.stop - tokens, match.stop, held,
        )  # fmt: skip
        self._filled[request.request_id] = set(held[self._load.start // self._block_size :])

    def work(self, scheduled: Any) -> Work:
        """Return the work of a step."""
        load, self._load = self._load, None
        self._waiting.difference_update(each.req_id for each in scheduled.scheduled_new_reqs)
        return Work(load, self._chunks(scheduled) if self._captured else [])

    def _chunks(self, scheduled: Any) -> list[Chunk]:
        cached = scheduled.scheduled_cached_reqs
        starts = {each.req_id: each.num_computed_tokens for each in scheduled.scheduled_new_reqs}
        starts |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        chunks = []
        for request_id in starts.keys() & self._captured.keys():
            start, context = starts[request_id], self._captured[request_id]
            stop = min(start + scheduled.num_scheduled_tokens[request_id], len(context))
            if start >= stop:
                continue
            (blocks,) = scheduled.kv_connector_block_state.get_block_ids(request_id)
            slot = blocks[start // self._block_size] * self._block_size + start % self._block_size
            chunks.append(Chunk(request_id, context, self._own, start, stop, slot))
        return chunks

    def stepped(self, invalid_blocks: set[int]) -> None:
        """Remember which requests' contexts could not be read: they are not tried again."""
        if invalid_blocks:
            self._failed |= {request_id for request_id, held in self._filled.items() if held & invalid_blocks}

    def finished(self, request: Any) -> dict[str, Any] | None:
        """Forget a request, and return what its output says of it."""
        request_id = request.request_id
        self._waiting.discard(request_id)
        match, refused = self._matches.pop(request_id, None), self._refused.pop(request_id, None)
        context = self._captured.pop(request_id, None)
        filled = self._filled.pop(request_id, None) is not None
        if request_id in self._failed:
            self._failed.discard(request_id)
            refused, match = "the context could not be read", None
        said: dict[str, Any] = {}
        if refused is not None:
            said = {"refused": refused}
        elif match is not None:
            said = {
                "context_tokens": match.stop,
                "sender": match.sender_name,
                "plan": str(match.plan),
                "loaded": filled,
            }
        elif context is not None:
            said = {"capture_tokens": len(context)}
        return {REQUEST: said} if said else None


def _check_plain(request: Any) -> None:
    """Raise a ValueError unless a request's K and V depend on its tokens and the model alone."""
    if request.prompt_token_ids is None or request.prompt_embeds is not None or request.has_encoder_inputs:
        raise ValueError("request: expected a prompt of tokens alone, got embeddings or inputs of other kinds")
    if request.resumable:
        raise ValueError("request: expected a prompt that is whole, got one that is streamed")
    if request.lora_request is not None:
        raise ValueError(f"request: expected no LoRA adapter, got {request.lora_request.lora_name!r}")


def _fingerprint(name: str, dtype: torch.dtype) -> Fingerprint:
    """Return the identity of a model, as the transformers path has it: of the same files, read by transformers.

    Raises:
        ValueError: there is no such model, it is of no supported family, or its RoPE depends on the length of prompts.
    """
    model, tokenizer = load_pretrained(name, dtype)
    decoder = Decoder(model)
    if decoder.rope_varies:
        raise ValueError(f"{name}: expected a RoPE that does not depend on the length of prompts, got one that does")
    if any(window is not None for window in decoder.windows):
        raise ValueError(f"{name}: expected attention over all tokens, got sliding windows")
    return decoder.fingerprint(tokenizer, weights=True)
