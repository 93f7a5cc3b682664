"""A load as agents make it: contexts that many requests share, which arrive by a Poisson process, and the times of answers."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import httpx2

from bench.pairs import Task
from bench.variants import glossary
from bench.variants.glossary import Entry
from droidspeak_ops.demo.measure import MAX_ANSWER_TOKENS, glossary_examples
from droidspeak_ops.example import TextExample

CHARACTERS = (4_000, 7_000)
"""The least and the most of a context: about 1,000 to 2,000 tokens."""
SECONDS = 900  # that an answer may take, under the highest load


@dataclass(frozen=True)
class Request:
    """A prompt, and how to ask.

    Args:
        prompt: token ids.
        wish: what is asked of the connector; None for nothing.
        tokens: the most that are generated.
    """

    prompt: list[int]
    wish: dict[str, Any] | None = None
    tokens: int = MAX_ANSWER_TOKENS

    @property
    def body(self) -> dict[str, Any]:
        """The JSON that is posted."""
        asked = {} if self.wish is None else {"kv_transfer_params": {"droidspeak": self.wish}}
        return {"prompt": self.prompt, "max_tokens": self.tokens, "temperature": 0, "stream": True, **asked}


class Answer(NamedTuple):
    """An answer, with the seconds from when its request was due to the first token and to the last."""

    first_token: float
    last_token: float
    text: str


def arrivals(rate: float, count: int, seed: int) -> list[float]:
    """Return the seconds at which requests arrive by a Poisson process; with another rate the same, stretched."""
    rng = random.Random(seed)
    return list(accumulate(rng.expovariate(1) / rate for _ in range(count)))


def draw_contexts(task: Task, contexts: int, questions: int, seed: int) -> list[list[TextExample]]:
    """Return for each of so many test contexts of a task as many questions; glossaries have entries of all that are shipped."""
    rng = random.Random(seed)
    if task.draw is not None:
        return [task.draw("test", rng.randint(*CHARACTERS), questions, rng) for _ in range(contexts)]
    shipped = dict.fromkeys(example.context for example in glossary_examples("test"))
    by_word = {entry.word: entry for context in shipped for entry in glossary.read_entries(context)}
    entries = list(by_word.values())
    return [_ask(entries, rng.randint(*CHARACTERS), questions, rng) for _ in range(contexts)]


def _ask(entries: Sequence[Entry], characters: int, questions: int, rng: random.Random) -> list[TextExample]:
    drawn = rng.sample(entries, len(entries))
    lengths = accumulate(len(entry.line) + 1 for entry in drawn)
    drawn = drawn[: sum(length <= characters for length in lengths)]
    context = glossary.context_text(drawn)
    asked = rng.sample(drawn, questions)
    return [TextExample(context, *glossary.ask(entry, reverse=rng.random() < 0.5)) for entry in asked]


def interleaved(contexts: Sequence[Sequence[TextExample]], questions: int, seed: int) -> list[TextExample]:
    """Return so many questions of each context in the order of arrival: some contexts are in use at a time, as by agents."""
    rng = random.Random(seed)
    listed = [question for context in contexts for question in context[:questions]]
    places = [place + rng.uniform(0, 2 * questions) for place in range(len(listed))]
    return [listed[place] for place in sorted(range(len(listed)), key=places.__getitem__)]


async def play(url: str, requests: Sequence[Request], due: Sequence[float]) -> list[Answer]:
    """Send each request when it is due, whether or not others are answered, and return their answers.

    Args:
        url: of a server.
        due: seconds from now, of each.

    Raises:
        ExceptionGroup: of a request that was not answered (httpx2.HTTPError, RuntimeError), or not in time.
    """
    limits = httpx2.Limits(max_connections=None)
    async with httpx2.AsyncClient(base_url=url, timeout=SECONDS, limits=limits) as client, asyncio.TaskGroup() as tasks:
        begun = time.perf_counter()
        sent = [
            tasks.create_task(_send(client, request, begun + seconds))
            for request, seconds in zip(requests, due, strict=True)
        ]
    return [task.result() for task in sent]


async def _send(client: httpx2.AsyncClient, request: Request, due: float) -> Answer:
    await asyncio.sleep(due - time.perf_counter())
    times, text = [], ""
    async with client.stream("POST", "/v1/completions", json=request.body) as response:
        response.raise_for_status()
        async for event in httpx2.EventSource(response):
            if event.data == "[DONE]":
                break
            said = event.json()
            if "choices" not in said:
                raise RuntimeError(f"{client.base_url}: expected tokens, got {event.data}")
            times.append(time.perf_counter() - due)
            text += said["choices"][0]["text"]
    return Answer(times[0], times[-1], text.strip())
