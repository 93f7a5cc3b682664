"""Files of maps: what fits its digest and is still no maps, since whoever wrote the file can have made that too."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import droidspeak_ops as ds
from bench.fuzzing.wholes import make_context, make_maps
from droidspeak_ops import tensor_file

Tensors = dict[str, torch.Tensor]


def _rewritten(path: Path, change: Callable[[dict[str, Any], Tensors], None]) -> None:
    """Write the maps of a file again, with other values or tensors and a digest that fits."""

    def make(values: dict[str, Any], tensors: tensor_file.Tensors) -> tuple[dict[str, Any], Tensors]:
        return values, {name: tensors.take(name) for name in tensors.names}

    values, tensors = tensor_file.read(path, "maps", dict[str, Any], make)
    change(values, tensors)
    tensor_file.write(path, "maps", values, tensors)


def _value(name: str, value: Any) -> Callable[[dict[str, Any], Tensors], None]:
    return lambda values, tensors: values.update({name: value})


def _tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, Any], Tensors], None]:
    return lambda values, tensors: tensors.update({name: change(tensors[name])})


def _without(name: str) -> Callable[[dict[str, Any], Tensors], None]:
    return lambda values, tensors: tensors.__delitem__(name)


def _renamed(name: str, other: str) -> Callable[[dict[str, Any], Tensors], None]:
    return lambda values, tensors: tensors.update({other: tensors.pop(name)})


def _moved(layer: int, other: int) -> Callable[[dict[str, Any], Tensors], None]:
    """All tensors of a layer, to another one."""

    def move(values: dict[str, Any], tensors: Tensors) -> None:
        for name in [name for name in tensors if name.startswith(f"{layer}.")]:
            tensors[f"{other}{name[1:]}"] = tensors.pop(name)

    return move


def _in_receiver(change: dict[str, Any]) -> Callable[[dict[str, Any], Tensors], None]:
    return lambda values, tensors: values["receiver"].update(change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_value("choices", ["project", "fitted"]), "choices: expected one for each of 3 layers, got .2, 3."),
        (_value("choices", ["project", "fitted", "copy"]), r"got 'copy' at choices\[2\]"),
        (_value("choices", ["project", "fitted", "recompute"]), "choices: expected one of .* for layer 2, got 'recompute'"),
        (_value("choices", ["fitted", "fitted", "reuse"]), "choices: expected one of .* for layer 0, got 'fitted'"),
        (_value("choices", ["project", "fitted", "fitted"]), "choices: expected the map of layer 2, which is 'fitted'"),
        (_value("choices_without_hidden", ["project", "fitted", "reuse"]), "choices_without_hidden: .* layer 1, got 'fitted'"),
        (_value("shares", {"1": [0.5]}), "expected array of length 2, got 1 at shares"),
        (_value("shares", {"3": [0.5, 0.5]}), r"shares: expected layers 1 to 2, got \[3\]"),
        (_value("shares", {"one": [0.5, 0.5]}), "expected int, got str at shares"),
        (_value("domain", {"layer": 3, "limit": 2.5}), "tensors: expected one named '3.domain.mean', got none"),
        (_value("domain", {"layer": 0, "limit": 0}), "domain: expected a layer of 3 and a positive limit, got layer 0 and 0"),
        (_value("domain", {"layer": 0}), "expected the field limit, got none at domain"),
        (_value("owner", "x"), "expected the fields sender, .*, got .'owner'."),
        (_in_receiver({"architecture": {}}), "architecture: expected one for sender and receiver"),
        (_in_receiver({"dtype": "float16"}), "dtype: expected float16"),
        (_in_receiver({"weights": None}), "sender, receiver: expected fingerprints with digests of their weights"),
        (_without("1.fitted.k_bias"), "tensors: expected one named '1.fitted.k_bias', got none"),
        (_without("1.correction.weight"), "tensors: expected one named '1.correction.weight', got none"),
        (_renamed("1.fitted.k_bias", "1.fitted.bias"), "tensors: expected one named '1.fitted.k_bias', got none"),
        (_renamed("1.fitted.k_bias", "k_bias"), "tensors: expected names such as .*, got 'k_bias'"),
        (_renamed("1.fitted.k_bias", "01.fitted.k_bias"), "tensors: expected names such as .*, got '01.fitted.k_bias'"),
        (lambda values, tensors: tensors.update({"1.fitted.q_bias": torch.ones(8)}), "expected no others, got ..1.fitted"),
        (_moved(2, 3), "choices_without_hidden: expected the map of layer 2, which is 'fitted_kv', got none"),
        (_moved(1, 0), "choices: expected the map of layer 1, which is 'fitted', got none"),
        (_tensor("1.fitted.k_weight", lambda weight: weight.T.contiguous()),
         r"layers\[1, fitted\]: expected k_weight to be torch.float32 \(8, 16\), got torch.float32 \(16, 8\)"),
        (_tensor("2.fitted_kv.v_bias", torch.Tensor.half), "expected v_bias to be torch.float32 .*, got torch.float16"),
        (_tensor("2.fitted_kv.v_bias", torch.Tensor.long), "expected v_bias to be torch.float32 .*, got torch.int64"),
        (_tensor("1.correction.bias", lambda bias: bias / 0), r"corrections\[1\]: expected finite values of bias"),
        (_tensor("0.domain.mean", lambda mean: mean[:-1]), r"domain: expected mean to be torch.float32 \(16,\), got"),
        (_tensor("0.domain.whitening", lambda matrix: matrix.double()), "domain: expected whitening .*, got torch.float64"),
    ],
)  # fmt: skip
def test_what_maps_of_a_stranger_get_wrong_is_named(change: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "maps.safetensors"
    make_maps().save(path)
    ds.Maps.load(path)
    _rewritten(path, change)
    with pytest.raises(ValueError, match=rf"maps\.safetensors: .*{message}"):
        ds.Maps.load(path)


@pytest.mark.parametrize("layer", [0, 3])
@pytest.mark.parametrize("part", ["layers", "corrections"])
def test_maps_are_of_layers_that_have_any(part: str, layer: int, tmp_path: Path) -> None:
    """Into layer 0 go the receiver's own embeddings, which nothing is to correct."""
    maps = make_maps()
    key = layer if part == "corrections" else (layer, "fitted")
    like = next(iter(getattr(maps, part).values()))
    wrong = dataclasses.replace(maps, **{part: {**getattr(maps, part), key: like}})
    with pytest.raises(ValueError, match=f"{part}: expected .*layers 1 to 2, got .*{layer}"):
        wrong.save(tmp_path / "maps")
    assert not list(tmp_path.iterdir())


def test_what_is_not_loaded_is_not_saved(tmp_path: Path) -> None:
    maps = make_maps()
    maps.layers[1, "fitted"].k_weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"layers\[1, fitted\]: expected finite values of k_weight, got NaN"):
        maps.save(tmp_path / "maps")
    assert not list(tmp_path.iterdir())


def test_a_distance_that_is_no_number_is_outside_of_every_domain() -> None:
    maps, context = make_maps(), make_context()
    assert 0 < maps.domain.distance(context) < float("inf")
    context.kv(0).values[0, 0, 4, 0] = torch.nan
    assert maps.domain.distance(context) == float("inf")
