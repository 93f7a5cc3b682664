"""Messages from the scheduler's half of the connector to the worker's half, with each step of the engine."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata

from ..context.fingerprint import Fingerprint
from ..prefill.plan import Plan


@dataclass(frozen=True)
class Load:
    """A context that fills the pages of a request before the request runs.

    Args:
        request_id: whose pages.
        prompt: the context's tokens and the one that follows, by which the store finds it; with all of the suffix where that
            selects tokens.
        length: of the context.
        sender, sender_name: who made the context.
        plan: of the request.
        rerotates: whether the sender's RoPE may be another.
        start, stop: the tokens whose pages are to be filled.
        blocks: the pages of the request's first `stop` tokens.
    """

    request_id: str
    prompt: list[int]
    length: int
    sender: Fingerprint
    sender_name: str
    plan: Plan
    rerotates: bool
    start: int
    stop: int
    blocks: list[int]


@dataclass(frozen=True)
class Chunk:
    """Tokens of a context that run in this step and are captured.

    Args:
        request_id: whose.
        context: all tokens of the context.
        sender: the model that runs.
        start, stop: those that run.
        slot: of the first of them.
    """

    request_id: str
    context: list[int]
    sender: Fingerprint
    start: int
    stop: int
    slot: int


@dataclass
class Work(KVConnectorMetadata):
    """The work of a step."""

    load: Load | None = None
    chunks: list[Chunk] = field(default_factory=list)
