"""The real tasks that variants are trained for, and the bench of fitted maps, on tiny models."""

import random
import re
from pathlib import Path

import pytest
import torch
from support.models import fine_tuned, tiny_llama, tiny_pair, tokens

import droidspeak_ops as ds
from bench import common, pairs
from bench.maps import layers, plots
from bench.maps import run as maps
from bench.variants import stdlib
from droidspeak_ops import metrics
from droidspeak_ops.demo.measure import glossary_examples

LAYERS = 4
SPLITS = ("train", "calibration", "test", "packages")


def test_no_module_is_in_two_splits() -> None:
    names = [set(stdlib.read_modules(split)) for split in SPLITS]
    assert all(len(each) > 20 for each in names)
    assert sum(map(len, names)) == len(set.union(*names))


@pytest.mark.parametrize("split", SPLITS)
def test_functions_are_listed_without_what_is_asked_of_them(split: str) -> None:
    functions = stdlib.read_functions(split)
    assert len(functions) > 50
    assert not any(function.summary in function.source for function in functions)
    assert all(re.search(rf"\bdef +{function.name}\b", function.source) for function in functions)


def test_form_feeds_shift_no_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Older modules have them between their parts."""
    text = '"""M."""\n\x0c\ndef f(x):\n    """Give back what has come in."""\n    y = x\n    z = y\n    return z\n'
    monkeypatch.setattr(stdlib, "read_modules", lambda split: {"m": text})
    (function,) = stdlib.read_functions("made up")
    assert function.source == "def f(x):\n    y = x\n    z = y\n    return z"


def test_questions_about_functions_share_a_context() -> None:
    examples = stdlib.draw_docs_examples("test", 3_000, 4, random.Random(0))
    assert len(examples) == 4 and len({example.context for example in examples}) == 1
    for example in examples:
        name = example.suffix.split("`")[1]
        assert f"def {name}(" in example.context and example.answer not in example.context


@pytest.mark.parametrize("questions", [1, 8])
def test_places_to_complete_code_at_lie_behind_the_context(questions: int) -> None:
    examples = stdlib.draw_code_examples("test", 2_000, questions, random.Random(0))
    assert len(examples) == questions and len({example.context for example in examples}) == 1
    source = [text for text in stdlib.read_modules("test").values() if examples[0].context in text]
    assert source, "the context is a stretch of a module"
    for example in examples:
        assert any(example.suffix + example.answer + "\n" in text for text in source)
        assert len(example.answer.strip()) >= 12
    if questions == 1:
        assert (
            any(examples[0].context + examples[0].suffix in text for text in source) or examples[0].suffix in source[0]
        )


def test_the_same_seed_draws_the_same_examples() -> None:
    one, other = (pairs.CODE.examples("test", 3) for _ in range(2))
    assert one == other and len(one) == 3
    assert len(pairs.DOCS.examples("calibration", 2)) > 2


def test_calibration_asks_nothing_of_the_test_split() -> None:
    test, calibration = glossary_examples("test"), glossary_examples("calibration")
    assert len(test) == 64 and len({example.context for example in calibration}) == 16
    definitions = {line.split(": ", 1)[1] for each in calibration for line in each.context.splitlines() if ": " in line}
    of_test = {line.split(": ", 1)[1] for each in test for line in each.context.splitlines() if ": " in line}
    assert not definitions & of_test
    assert len({each.context for each in pairs.GLOSSARY.examples("calibration", 5)}) == 5
    assert pairs.GLOSSARY.examples("packages", 5) == pairs.GLOSSARY.examples("calibration", 5), "there is no other"


def test_scores() -> None:
    assert metrics.f1("a wooden boat", "a wooden ship") == pytest.approx(0.5)
    assert metrics.rouge_l("Return the sum.", "Return the sum.") == 1.0
    assert metrics.rouge_l("Nothing alike", "Return the sum.") == 0.0
    assert metrics.edit_similarity("  x = 1\ny = 2", "x = 1") == 1.0
    assert metrics.edit_similarity("x = 2", "x = 1") == pytest.approx(0.8)


def test_a_variant_that_was_not_made_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DROIDSPEAK_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"bench\.variants\.train code"):
        pairs.load_variant("code")


def test_distance_of_weights() -> None:
    model = tiny_llama()
    assert maps.relative_distance(model, model) == 0.0
    assert maps.relative_distance(model, fine_tuned(model, 0.1)) > 0.01


def test_ratios_have_intervals_around_them() -> None:
    base = [1.0 + number / 10 for number in range(20)]
    row = common.ratio_and_interval("r", [0.5 * each for each in base], base)
    assert row == {"r": "0.5", "r_low": "0.5", "r_high": "0.5"}
    row = common.mean_and_interval("m", base)
    assert float(row["m_low"]) < float(row["m"]) < float(row["m_high"])


@pytest.fixture(scope="module")
def pair() -> pairs.LoadedPair:
    return pairs.LoadedPair(pairs.PAIRS["lora"], *tiny_pair(LAYERS), None)


@pytest.fixture(scope="module")
def fitted(pair: pairs.LoadedPair) -> ds.Maps:
    examples = [ds.Example.cut(tokens(160)) for _ in range(12)]
    return ds.fit(pair.sender, pair.receiver, examples, bands=[(2, 4)], steps=0, show_progress=False)


def test_ways_are_measured_against_the_own_prefill(pair: pairs.LoadedPair, fitted: ds.Maps, monkeypatch) -> None:
    monkeypatch.setattr(maps, "BAND", (2, 4))
    ways = {**maps.ways_with(fitted, fitted), "everything": maps.Way(ds.Plan([(0, LAYERS)]))}
    found = maps.divergences(pair, ways, [ds.Example.cut(tokens(160)) for _ in range(4)])
    mean = {way: sum(values) / len(values) for way, values in found.items()}
    assert mean["everything"] < 1e-9
    assert mean["fitted"] < mean["reuse"] and mean["band corrected, rest fitted"] < mean["band"]


def test_maps_of_full_rank_are_the_maps(pair: pairs.LoadedPair, fitted: ds.Maps) -> None:
    full, one = (layers.of_rank(pair.sender, pair.receiver, fitted, rank) for rank in (64, 1))
    for key, each in fitted.layers.items():
        torch.testing.assert_close(full.layers[key].k_weight, each.k_weight)
        if key[1] == "fitted":
            assert not torch.allclose(one.layers[key].v_weight, each.v_weight, atol=1e-3)


def test_errors_by_layer_and_their_plots(pair: pairs.LoadedPair, fitted: ds.Maps, tmp_path: Path) -> None:
    contexts = [tokens(120) for _ in range(8)]
    delimiters = torch.tensor([3, 4, 5])
    rows = layers.errors_by_layer(pair.sender, pair.receiver, fitted, contexts[:6], contexts[6:], delimiters)
    assert [row["layer"] for row in rows] == [1, 2, 3]
    assert all(float(row["fitted"]) < float(row["reused"]) for row in rows)
    common.write_csv(tmp_path / "layers.csv", [{"pair": "tiny", **row} for row in rows])
    part = {"of_reuse": "0.7", "of_reuse_low": "0.6", "of_reuse_high": "0.8"}
    common.write_csv(tmp_path / "pairs.csv", [{"pair": "tiny", "way": way, **part} for way in plots.WAYS])
    counted = [{"pair": "tiny", "way": "fitted", "tokens": size, **part} for size in (1000, 9000)]
    common.write_csv(tmp_path / "tokens.csv", counted)
    plots.draw(tmp_path)
    assert {path.stem for path in tmp_path.glob("*.png")} == {"layers", "pairs", "tokens"}


def test_what_is_measured_is_kept_when_a_later_pair_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def measure(pair: pairs.LoadedPair, contexts: int) -> list[dict[str, object]]:
        if pair.named.name == "full":
            raise FileNotFoundError("not made")
        return [{"contexts": contexts, "device": pair.receiver.device}]

    monkeypatch.setattr(pairs, "load_variant", lambda name: (tiny_llama(), None))
    monkeypatch.setattr(maps, "measure_pair", measure)
    with pytest.raises(FileNotFoundError):
        maps.main(["--only", "pairs", "--pairs", "lora", "full", "--contexts", "5", "--folder", str(tmp_path)])
    assert (tmp_path / "pairs.csv").read_text().splitlines()[1].startswith("lora,5,cpu,")
