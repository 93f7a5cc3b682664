"""A pair of models as servers are told of them, and what transformers computes in the place of an engine."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from support.models import fine_tuned, save_with_tokenizer, tiny, tokens

import droidspeak_ops as ds
from droidspeak_ops.hf.pretrained import load_pretrained

LAYERS = 6
MADE_OF_ALL = ("project", "fitted", "fitted_kv", "reuse", "fitted", "fitted_kv")


PLANS = {
    "reuse": ds.Plan(),
    "middle": ds.Plan(bands=[(2, 4)]),
    "first": ds.Plan(bands=[(0, 3)], project=[4]),
    "two": ds.Plan(bands=[(1, 2), (4, 6)], project=[3]),
    "whole": ds.Plan(bands=[(0, LAYERS)]),
    "projected": ds.Plan(project="rest"),
}


class Pair:
    """A sender and a receiver with what a server of either is told: folders, a store, maps.

    Args:
        sender_folder, receiver_folder: of the models with their tokenizers.
        folder: for the rest.
    """

    def __init__(self, sender_folder: str, receiver_folder: str, folder: Path) -> None:
        self.sender_folder, self.receiver_folder, self.folder = sender_folder, receiver_folder, folder
        self._random = torch.Generator().manual_seed(0)
        (self.sender, self.tokenizer), (self.receiver, _) = map(load_pretrained, (sender_folder, receiver_folder))
        self.store = ds.ContextStore(folder / "store")

    @classmethod
    def of_family(cls, family: str, folder: Path) -> Pair:
        """Return a tiny pair of a family."""
        torch.manual_seed(0)
        windows = {} if family == "llama" else {"sliding_window": None}
        sender = tiny(family, LAYERS, hidden_size=128, head_dim=32, **windows)  # the least that vLLM serves on a CPU
        folders = (
            save_with_tokenizer(model, folder / role)
            for role, model in (("sender", sender), ("receiver", fine_tuned(sender, 0.3)))
        )
        return cls(*folders, folder)

    def captured(self, ids: torch.Tensor, model: str = "sender") -> ds.SharedContext:
        """The context of tokens as transformers captures it, of the sender or of the receiver."""
        layers = range(1, self.sender.config.num_hidden_layers)
        return ds.capture(getattr(self, model), ids, layers=layers, tokenizer=self.tokenizer)

    def tokens(self, count: int) -> torch.Tensor:
        """Tokens that no other test of the engine is given."""
        return torch.randint(1, 100, (1, count), generator=self._random)

    def stored(self, count: int) -> torch.Tensor:
        """The same, and the store has a context of them, as transformers captures it."""
        ids = self.tokens(count)
        self.store.save(self.captured(ids))
        return ids

    def fit(self) -> ds.Maps:
        """Maps of which every kind is used, kept in a file."""
        examples = [ds.Example.cut(tokens(160), 32) for _ in range(6)]
        maps = ds.fit(self.sender, self.receiver, examples, bands=[(2, 4)], show_progress=False)
        without = ("project", *["fitted_kv"] * (LAYERS - 1))
        maps = dataclasses.replace(
            maps,
            layers=maps.repaired,
            choices=MADE_OF_ALL,
            choices_without_hidden=without,
            domain=dataclasses.replace(maps.domain, limit=1e3),  # they have seen few contexts
        )
        maps.save(self.folder / "maps.safetensors")
        return maps

    def settings(self, role: str, **extra: Any) -> dict[str, Any]:
        """``KVTransferConfig`` of a server."""
        config = {"store": self.store.url, **extra}
        if role != "kv_producer":
            config = {"senders": {"base": {"model": self.sender_folder}}} | config
        return {"kv_role": role, "kv_load_failure_policy": "recompute", "kv_connector_extra_config": config}

    def expected(
        self,
        ids: torch.Tensor,
        suffix: torch.Tensor,
        plan: ds.Plan | None,
        maps: ds.Maps | None = None,
        count: int = 12,
    ) -> list[int]:
        """The receiver's greedy tokens by transformers, over what it makes of the sender's context or over its own prefill."""
        if plan is not None:
            return self.generated(self.captured(ids), suffix, plan, maps, count)
        return self._generated(torch.cat([ids, suffix], dim=1), None, count)

    def generated(
        self,
        context: ds.SharedContext,
        suffix: torch.Tensor,
        plan: ds.Plan,
        maps: ds.Maps | None = None,
        count: int = 12,
    ) -> list[int]:
        """The receiver's greedy tokens by transformers, over what it makes of a context."""
        prompt_ids = torch.cat([context.tokens, suffix], dim=1)
        cache = ds.partial_prefill(self.receiver, context, plan, maps=maps, prompt_ids=prompt_ids)
        return self._generated(prompt_ids, cache, count)

    def _generated(self, prompt_ids: torch.Tensor, cache: ds.MixedCache | None, count: int) -> list[int]:
        out = self.receiver.generate(prompt_ids, past_key_values=cache, max_new_tokens=count, do_sample=False)
        return out[0, prompt_ids.shape[1] :].tolist()


def asking(plan: ds.Plan, **more: Any) -> dict[str, Any]:
    """Return the wish of a request that is to be served by a plan."""
    return {"plan": json.loads(plan.to_json()), **more}


def prompt(ids: torch.Tensor, suffix: torch.Tensor) -> list[int]:
    return torch.cat([ids, suffix], dim=1)[0].tolist()
