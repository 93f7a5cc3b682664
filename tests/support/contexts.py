"""Contexts compared."""

from pathlib import Path

import torch

import droidspeak_ops as ds


def assert_same(found: ds.SharedContext | None, expected: ds.SharedContext) -> None:
    """Every tensor, bit for bit."""
    assert found is not None
    assert torch.equal(found.tokens, expected.tokens)
    assert found.sender == expected.sender
    assert found.hidden_layers == expected.hidden_layers
    for layer in range(expected.num_layers):
        assert_equal(found.kv(layer), expected.kv(layer))
        assert_equal(found.rotations[layer] or (), expected.rotations[layer] or ())
    for layer in expected.hidden_layers:
        assert torch.equal(found.hidden(layer), expected.hidden(layer))


def assert_equal(found, expected) -> None:
    """K and V, or rotations."""
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours.float(), theirs.float())


def read(context: ds.SharedContext | None) -> None:
    """Read all of a context, of which a stored one is read when it is used."""
    assert context is not None
    context.sinks(0, 1)
    for layer in range(context.num_layers):
        context.kv(layer)
    for layer in context.hidden_layers:
        context.hidden(layer)


def files(store: ds.ContextStore) -> list[Path]:
    """The files of a store in a folder."""
    return [Path(store.url) / each.name for each in store.stored()]
