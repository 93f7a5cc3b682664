"""What a sender leaves behind after reading a context, for receivers to build on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from .fingerprint import Fingerprint, ReuseError


@dataclass(frozen=True, eq=False)
class SharedContext:
    """The tokens of a context with the sender's K/V at every layer and its hidden states at some.

    It is read layer by layer, through :meth:`kv` and :meth:`hidden`, and never written to: receivers that reuse a layer
    share its tensors until they append to it.

    Args:
        tokens: int64 ``[B, T]``.
        keys_values: for each layer K (rotated) and V, each ``[B, K, T, D]``.
        hidden_states: by layer, the residual stream that enters it, ``[B, T, C]`` (the paper's E cache).
        sender: who made it.
    """

    tokens: torch.Tensor
    keys_values: Sequence[tuple[torch.Tensor, torch.Tensor]]
    hidden_states: Mapping[int, torch.Tensor]
    sender: Fingerprint

    @property
    def num_layers(self) -> int:
        return len(self.keys_values)

    @property
    def hidden_layers(self) -> tuple[int, ...]:
        """The layers at which hidden states are held."""
        return tuple(sorted(self.hidden_states))

    def kv(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K (rotated) and V of one layer, each ``[B, K, T, D]``."""
        return self.keys_values[layer]

    def hidden(self, layer: int) -> torch.Tensor:
        """The hidden states that enter one layer, ``[B, T, C]``.

        Raises:
            ReuseError: they were not captured.
        """
        self.check_hidden([layer])
        return self.hidden_states[layer]

    def check_hidden(self, layers: Sequence[int]) -> None:
        """Raise unless hidden states are held at all of `layers`.

        Raises:
            ReuseError: some are missing; the message names them.
        """
        missing = [layer for layer in layers if layer not in self.hidden_states]
        if missing:
            raise ReuseError(
                f"hidden states: missing at layers {missing}, held at {list(self.hidden_layers)}; "
                "capture with layers=plan.hidden_layers(num_layers)"
            )

    def check_prompt(self, prompt_ids: torch.Tensor) -> None:
        """Raise unless `prompt_ids` ``[B, N]`` are the tokens of this context followed by at least one more.

        Raises:
            ReuseError: the prompt is another one, or has no suffix; the message says where they part.
        """
        batch, length = self.tokens.shape
        if prompt_ids.dim() != 2 or prompt_ids.shape[0] != batch or prompt_ids.shape[1] <= length:
            raise ReuseError(
                f"prompt_ids: got shape {tuple(prompt_ids.shape)}; ({batch}, more than {length}) is needed: "
                "the tokens of the context, then a suffix"
            )
        differs = (prompt_ids[:, :length].to(self.tokens.device) != self.tokens).any(0).nonzero()
        if differs.numel():
            at = int(differs[0])
            raise ReuseError(f"prompt_ids: differ from the context at token {at}; a prompt that continues it is needed")
