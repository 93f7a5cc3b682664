"""Training of maps on what suffixes read: its loss and gradient, what it leaves alone, and runs that are killed."""

import dataclasses

import pytest
import torch
from support.compare import assert_bitwise_equal, assert_close
from support.models import FAMILIES, fine_tuned, tiny, tiny_llama, tokens

import droidspeak_ops as ds
from droidspeak_ops.fitting import training
from droidspeak_ops.fitting.pair import FITTED, Pair
from droidspeak_ops.fitting.reading import LayerReading, Readings
from droidspeak_ops.fitting.training import Workplace, both, is_held_out, mean_loss, train, train_layer
from droidspeak_ops.hf.decoder import Decoder
from droidspeak_ops.prefill.maps import LayerMap

LAYERS, SUFFIX = 3, 12
STEP = 1e-3  # norms and RoPE are in float32


def examples(count: int, length: int = 60) -> list[ds.Example]:
    return [ds.Example.cut(tokens(length), SUFFIX) for _ in range(count)]


def read(sender, receiver, some: list[ds.Example], folder) -> tuple[Pair, Readings]:
    pair, contexts = Pair(Decoder(sender), Decoder(receiver), []), []
    readings = Readings(pair, contexts, folder)
    for example in some:
        contexts.append(ds.capture(sender, example.context, layers=pair.layers))
        readings.add(ds.capture(receiver, example.context), [example, example])
    return pair, readings


def own_map(pair: Pair, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The receiver's own projection, as a map of the sender's hidden states."""
    projection = pair.projection(pair.receiver, layer)
    return projection.weight.detach().float(), projection.bias.detach().float()


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_of_equal_models_the_own_projection_has_no_loss(family: str, tmp_path) -> None:
    model = tiny(family, LAYERS)
    pair, readings = read(model, model, examples(1), tmp_path)
    for layer in pair.layers:
        reading = readings.layer(0, layer, "fitted")
        assert float(reading.loss(*own_map(pair, layer))) < 1e-4  # rows are kept in 16 bits
        weight, bias = own_map(pair, layer)
        assert float(reading.loss(weight + 0.1 * torch.randn_like(weight), bias)) > 1e-3


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_attention_is_that_of_the_model(family: str, tmp_path) -> None:
    """The target, over the receiver's own K and V, is what the model's own attention gives."""
    model = tiny(family, LAYERS)
    (example,) = examples(1)
    _, readings = read(model, model, [example], tmp_path)
    found: dict[int, torch.Tensor] = {}
    for layer, module in enumerate(Decoder(model).layers):
        module.self_attn.register_forward_hook(lambda _, args, out, layer=layer: found.__setitem__(layer, out[0]))
    with torch.no_grad():
        model(torch.cat((example.prompt, example.answer[:, :-1]), dim=1))
    behind = example.context.shape[1]
    for layer in range(1, LAYERS):
        target = readings.layer(0, layer, "fitted").target
        length = found[layer].shape[1] - behind
        for suffix in (target[:length], target[length:]):  # the example is there twice, each blind to the other
            assert_close(suffix, found[layer][0, behind:], torch.float32, operations=4)


@pytest.mark.parametrize("source", FITTED)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "qwen3", "olmo2"])
def test_the_gradient_is_that_of_finite_differences(family: str, source, tmp_path) -> None:
    sender = tiny(family, LAYERS)
    receiver = fine_tuned(sender, 0.2)
    pair, readings = read(sender, receiver, examples(1, 40), tmp_path)
    reading = in_double(readings.layer(0, 2, source))
    weight, bias = (torch.randn(shape, dtype=torch.float64) * 0.1 for shape in shapes(pair, reading))
    weight.requires_grad_()
    bias.requires_grad_()
    gradients = torch.autograd.grad(reading.loss(weight, bias), (weight, bias))
    for part, gradient in zip((weight, bias), gradients, strict=True):
        largest = float(gradient.abs().max())
        for flat in torch.randperm(part.numel())[:6].tolist():
            step = torch.zeros(part.numel(), dtype=torch.float64)
            step[flat] = STEP
            moved = [
                float(
                    reading.loss(
                        *(each + sign * step.view_as(part) if each is part else each for each in (weight, bias))
                    )
                )
                for sign in (1, -1)
            ]
            expected = float(gradient.flatten()[flat])
            assert (moved[0] - moved[1]) / (2 * STEP) == pytest.approx(expected, rel=0.01, abs=1e-3 * largest)


def in_double(reading: LayerReading) -> LayerReading:
    changed = {
        field.name: value.double()
        for field in dataclasses.fields(reading)
        if isinstance(value := getattr(reading, field.name), torch.Tensor) and value.is_floating_point()
    }
    weight = reading.output.weight.detach().double()
    bias = None if reading.output.bias is None else reading.output.bias.detach().double()
    return dataclasses.replace(
        reading,
        **changed,
        output=lambda rows: torch.nn.functional.linear(rows.double(), weight, bias),
        output_dtype=torch.float64,
        rotation=None if reading.rotation is None else tuple(half.double() for half in reading.rotation),
    )


def shapes(pair: Pair, reading: LayerReading) -> tuple[tuple[int, int], tuple[int]]:
    width = 2 * pair.receiver.num_kv_heads * pair.receiver.head_dim
    return (width, reading.rows.shape[1]), (width,)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_oss"])
def test_training_lowers_the_loss_of_contexts_held_out(family: str, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From beside a solution it goes back towards that."""
    monkeypatch.setattr(training, "LEARNING_RATE", 0.03)
    model = tiny(family, LAYERS)
    pair, readings = read(model, model, examples(10), tmp_path)
    each = [readings.layer(number, 2, "fitted") for number in range(len(readings))]
    held_out = [reading for number, reading in enumerate(each) if is_held_out(number, len(each))]
    start = as_map(*(part + 0.05 * torch.randn_like(part) for part in own_map(pair, 2)))
    trained = train_layer(each.__getitem__, len(each), start, 60, torch.Generator().manual_seed(0))
    assert mean_loss(held_out, *both(trained)) < 0.8 * mean_loss(held_out, *both(start))


def as_map(weight: torch.Tensor, bias: torch.Tensor) -> LayerMap:
    return LayerMap(*(part.contiguous() for part in (*weight.chunk(2), *bias.chunk(2))))


def test_a_solution_is_left_as_it_is(tmp_path) -> None:
    model = tiny_llama(layers=LAYERS)
    pair, readings = read(model, model, examples(6), tmp_path)
    start = as_map(*own_map(pair, 1))
    each = [readings.layer(number, 1, "fitted") for number in range(len(readings))]
    assert train_layer(each.__getitem__, len(each), start, 20, torch.Generator().manual_seed(0)) is start


class Killed(Exception):
    pass


def test_a_killed_run_goes_on_and_ends_as_if_it_had_not_been(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "LEARNING_RATE", 0.01)
    monkeypatch.setattr(training, "_MAX_LOSS_RATIO", 10.0)  # whatever is trained is taken
    monkeypatch.setattr("droidspeak_ops.fitting.run._MAX_KL_RATIO", 10.0)
    sender = tiny_llama(layers=LAYERS)
    receiver, some = fine_tuned(sender, 0.1), examples(10)
    whole = ds.fit(sender, receiver, some, steps=15, seed=3, show_progress=False)
    assert whole.layers.keys() == whole.repaired.keys()
    for key, layer_map in whole.layers.items():  # plans with a repair use them too
        assert_bitwise_equal(both(layer_map)[0], both(whole.repaired[key])[0])
    width = receiver.config.hidden_size

    def killed_later(read, count, start: LayerMap, *args) -> LayerMap:
        if start.k_weight.shape[1] != width:  # the maps from K/V, which come after those from hidden states
            raise Killed
        return train_layer(read, count, start, *args)

    with monkeypatch.context() as patched:
        patched.setattr(training, "train_layer", killed_later)
        with pytest.raises(Killed):
            ds.fit(sender, receiver, some, steps=15, seed=3, folder=tmp_path / "work", show_progress=False)
    assert len(list((tmp_path / "work" / "trained").glob("*.fitted.safetensors"))) == 2
    with pytest.raises(ValueError, match="expected a journal of this run"):
        ds.fit(sender, receiver, some, steps=15, seed=4, folder=tmp_path / "work", show_progress=False)
    resumed = ds.fit(sender, receiver, some, steps=15, seed=3, folder=tmp_path / "work", show_progress=False)
    assert resumed.digest() == whole.digest()
    assert list((tmp_path / "work").iterdir()) == []
    assert ds.fit(sender, receiver, some, steps=15, seed=4, show_progress=False).digest() != whole.digest()


def test_what_does_not_help_contexts_held_out_is_left_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    sender = tiny_llama(layers=LAYERS)
    receiver, some = fine_tuned(sender, 0.1), examples(10)

    def worse(read, count, start: LayerMap, *args) -> LayerMap:
        return LayerMap(*(part + 0.3 * torch.randn_like(part) for part in vars(start).values()))

    monkeypatch.setattr(training, "train_layer", worse)
    trained = ds.fit(sender, receiver, some, steps=2, show_progress=False)
    assert trained.digest() == ds.fit(sender, receiver, some, steps=0, show_progress=False).digest()


def test_two_runs_do_not_share_a_folder(tmp_path) -> None:
    with Workplace(tmp_path, {"run": 1}), pytest.raises(ValueError, match="one run at a time"):
        Workplace(tmp_path, {"run": 1})


def test_a_folder_with_files_of_others_is_refused(tmp_path) -> None:
    """It would be cleared in the end."""
    (tmp_path / "contexts").mkdir()
    with pytest.raises(ValueError, match="folder: expected an empty one, or that of a fit which was killed"):
        Workplace(tmp_path, {"run": 1})
    assert (tmp_path / "contexts").is_dir()


def test_the_receiver_takes_no_gradient(tmp_path) -> None:
    sender = tiny_llama(layers=LAYERS)
    receiver = fine_tuned(sender, 0.1)
    pair, readings = read(sender, receiver, examples(5), tmp_path)
    start = {(1, "fitted"): as_map(*own_map(pair, 1))}
    with Workplace(None, {}) as work:
        train(readings, start, 3, 0, work, lambda keys: keys)
        folder = work.folder
    assert not folder.exists()
    assert all(weight.grad is None for weight in receiver.parameters())


def test_negative_steps_are_refused() -> None:
    model = tiny_llama(layers=LAYERS)
    with pytest.raises(ValueError, match="steps: expected 0 or more, got -1"):
        ds.fit(model, model, examples(3), steps=-1, show_progress=False)
