"""The bench of selected tokens, on tiny models and made-up results: its tasks, other selectors, rows, and what a page says."""

import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.models import tiny_pair, tokens

import droidspeak_ops as ds
from bench import located, pairs, selected, selected_page
from bench.common import Row, read_csv, write_csv
from bench.other_selectors import mean_attention, random_windows
from bench.variants import glossary
from droidspeak_ops.example import TextExample
from droidspeak_ops.prefill import select
from droidspeak_ops.prefill.schedule import resolve
from droidspeak_ops.profiling.frontier import Point

LAYERS = 6


class Words:
    """A tokenizer of words and special tokens, by their hash."""

    eos_token_id = None

    def __call__(self, text: str, add_special_tokens: bool) -> object:
        ids = [1 + sum(word.encode()) % 100 for word in text.replace("<|im_", " <|im_").split()]
        return type("Encoding", (), {"input_ids": ids})

    def decode(self, ids: torch.Tensor, skip_special_tokens: bool) -> str:
        return " ".join(map(str, ids.tolist()))


@pytest.fixture(scope="module")
def pair() -> pairs.LoadedPair:
    return pairs.LoadedPair(pairs.PAIRS["lora"], *tiny_pair(LAYERS), Words())


@pytest.fixture(scope="module")
def maps(pair: pairs.LoadedPair) -> ds.Maps:
    some = [ds.Example.cut(tokens(160)) for _ in range(6)]
    return ds.fit(pair.sender, pair.receiver, some, bands=[(2, 5)], steps=0, show_progress=False)


# --- tasks ------------------------------------------------------------------------------------------------------------------


def entries(context: str) -> list[tuple[str, str]]:
    return [(entry.word, entry.definition) for entry in glossary.read_entries(context)]


def test_entries_are_read_as_they_were_written() -> None:
    drawn = [glossary.Entry("brok", "a dull sound"), glossary.Entry("plai", "one who: tells")]
    assert glossary.read_entries(glossary.context_text(drawn)) == drawn


def test_a_reference_is_far_from_what_it_refers_to() -> None:
    plain, linked = (task.examples("test", 8) for task in (pairs.GLOSSARY, pairs.LINKED))
    for before, after in zip(plain, linked, strict=True):
        kept, changed = entries(before.context), entries(after.context)
        (place,) = [number for number, each in enumerate(changed) if each != kept[number]]
        word, reference = changed[place]
        target = dict(changed[len(changed) // 2 :])
        named = reference.removeprefix('another word for "').removesuffix('"')
        assert target[named] == after.answer and place < len(changed) // 4
        first, second = after.suffix.split(f"{reference}<|im_end|>\n")
        assert first == glossary.ask(glossary.Entry(word, ""), reverse=False)[0]
        assert second == glossary.ask(glossary.Entry(named, ""), reverse=False)[0]


def test_answers_are_spread_out_over_contexts() -> None:
    for example in pairs.SPREAD_OUT.examples("test", 8):
        words = [word for word, _ in entries(example.context)]
        listed = [line.split(": ", 1) for line in example.answer.split("\n")]
        assert sorted(4 * words.index(word) // len(words) for word, _ in listed) == [0, 1, 2, 3]
        assert all(f"{word}: {definition}" in example.context for word, definition in listed)
        assert not any(word in example.suffix for word, _ in listed)


def test_a_task_draws_the_same_again_and_scores_what_has_a_metric() -> None:
    assert pairs.LINKED.examples("test", 3) == pairs.FOLLOW_UP.examples("test", 3)
    with pytest.raises(ValueError, match="metric: expected"):
        pairs.SPREAD_OUT.score("a", "a")


def test_of_a_follow_up_the_first_question_is_known(pair: pairs.LoadedPair) -> None:
    (text,) = pairs.LINKED.examples("test", 1)
    known = {}
    for task in (pairs.LINKED, pairs.FOLLOW_UP):
        asked = replace(pair, named=replace(pair.named, task=task))
        known[task] = asked.known(text)
    (example,) = (text.encode(pair.tokenizer) for _ in range(1))
    first = text.suffix.split(glossary.ANSWERS)[0] + glossary.ANSWERS
    assert known[pairs.LINKED] == example.suffix.shape[1]
    assert known[pairs.FOLLOW_UP] == len(pair.tokenizer(first, add_special_tokens=False).input_ids)


# --- selectors --------------------------------------------------------------------------------------------------------------


def test_the_mean_attention_is_that_of_the_suffix_over_the_reused_cache(pair: pairs.LoadedPair) -> None:
    prompt = tokens(90)
    context, suffix = ds.capture(pair.sender, prompt[:, :80]), prompt[:, 80:]
    before = pair.receiver.config._attn_implementation
    chosen = mean_attention(pair.receiver, context, 7)(prompt[0, :80], suffix[0])
    assert chosen.dtype == torch.int64 and len(chosen) == 7 and torch.equal(chosen, chosen.sort().values)
    assert pair.receiver.config._attn_implementation == before

    # Of keys that were not replaced by the reuse, which is of the receiver itself, it is the attention of one pass over all.
    own = ds.capture(pair.receiver, prompt[:, :80])
    pair.receiver.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            layers = pair.receiver(prompt, output_attentions=True).attentions
    finally:
        pair.receiver.set_attn_implementation(before)
    mean = torch.stack([each[0, :, 80:, :80].mean((0, 1)) for each in layers]).mean(0)
    chosen = mean_attention(pair.receiver, own, 0.1)(prompt[0, :80], suffix[0])
    assert chosen.tolist() == mean.topk(48).indices.sort().values.tolist()


def test_peaks_of_each_layer_are_what_selection_takes_the_largest_of(
    pair: pairs.LoadedPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    example = ds.Example(tokens(80), tokens(6), tokens(3))
    by_layer = located.peaks_by_layer(pair, example, 4)
    assert by_layer.shape == (4, 80) and by_layer.min() >= 0 and by_layer.max() <= 1
    assert not by_layer[:, :4].any() and len(by_layer.amax(1).unique()) == 4
    taken = []
    monkeypatch.setattr(select, "around_peaks", lambda scores, count: taken.append(scores) or torch.arange(count))
    ds.partial_prefill(pair.receiver, pair.capture(example.context), ds.Plan(select=2), prompt_ids=example.prompt)
    assert torch.equal(taken[0], by_layer[2:4].amax(0)), "of six layers the two in the middle"


def test_the_tokens_of_an_answer() -> None:
    def tokenizer(text: str, return_offsets_mapping: bool) -> dict[str, list[tuple[int, int]]]:
        return {"offset_mapping": [(start, start + 3) for start in range(0, len(text), 3)]}

    text = TextExample("012345678901abcd", "?", "78901a")
    assert located.answer_tokens(tokenizer, text) == {2, 3, 4}


def test_random_windows_are_the_same_at_every_call() -> None:
    one, other = (random_windows(torch.zeros(50, dtype=torch.int64), torch.zeros(3)) for _ in range(2))
    assert torch.equal(one, other) and len(one.unique()) > 40


# --- judging ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def cases(pair: pairs.LoadedPair, maps: ds.Maps, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder, for cases of tiny models with a metric, with two turns, and without a metric."""

    def ask(context: str, rng: random.Random) -> TextExample:
        def words(count: int) -> str:
            return " ".join(f"w{rng.randrange(90)}" for _ in range(count))

        return TextExample(words(70), f"{words(4)} {glossary.ANSWERS} {words(3)} {glossary.ANSWERS}", words(5))

    tasks = {"lora": ("F1", False), "follow-up": ("F1", True), "spread-out": (None, False)}
    made = {
        name: pairs.Case(pairs.PAIRS["lora"], pairs.Task(metric, ask=ask, first_turn=first), name)
        for name, (metric, first) in tasks.items()
    }
    bands = [ds.Plan([band]) for band in ((1, 3), (2, 4))]
    monkeypatch.setattr(selected, "CASES", made)
    monkeypatch.setattr(selected_page, "CASES", made)
    monkeypatch.setattr(selected, "TIMED_TOKENS", (60, 90))
    for module in (pairs, selected):
        monkeypatch.setattr(module, "MAX_ANSWER_TOKENS", 3)
    monkeypatch.setattr(selected, "profiled", lambda pair, plain: [selected.Way(str(plan), plan) for plan in bands])
    monkeypatch.setattr(selected, "frontiers_of", lambda folder: (None, None))
    monkeypatch.setattr(selected, "fitted_maps", lambda of, calibration: pairs.Fitted(maps, 0.0, 0))
    monkeypatch.setattr(pairs.NamedPair, "load", lambda self: pair)
    return tmp_path


def test_the_whole_bench(cases: Path) -> None:
    for only in ("judge", "time"):
        selected.main(
            ["--folder", str(cases), "--contexts", "2", "--rounds", "1", "--only", only, "--pairs", *selected.CASES]
        )
    names = [way.name for way in selected.WAYS] + ["band [1, 3)", "band [2, 4)"]
    for case in selected.CASES:
        rows = read_csv(cases / case / "judged.csv")
        assert [(row["context"], row["way"]) for row in rows] == [
            (str(number), way) for number in range(2) for way in ("full prefill", *names)
        ]
        assert all(
            row["same"] == "1.0" and abs(float(row["kl"])) < 1e-9 for row in rows if row["way"] == "full prefill"
        )
        assert all((row["exact"] == "") == (case == "spread-out") for row in rows)
    page = cases / "selected.md"
    page.write_text(f"before\n{selected_page.MARKS[0]}\nold\n{selected_page.MARKS[1]}\nafter\n")
    selected.main(["--folder", str(cases), "--only", "page", "--page", str(page)])
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert [line for line in text.splitlines() if line.startswith("### ")] == [
        f"### `{case}`" for case in selected.CASES
    ]
    assert text.count("| selected 5 % over fitted |") == 3 * 3, "its quality, and beside bands at both lengths"
    assert (cases / "selected.png").read_bytes().startswith(b"\x89PNG")


def test_a_later_run_adds_what_is_missing(cases: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, filled = cases / "lora" / "judged.csv", []
    fill = selected.Way.fill

    def counted(way: selected.Way, receiver: object, maps: object, context: ds.SharedContext, prompt: object) -> object:
        if way.name == "recent 10 %" and len(filled) == 5:
            raise KeyboardInterrupt
        filled.append(way.name)
        return fill(way, receiver, maps, context, prompt)

    monkeypatch.setattr(selected.Way, "fill", counted)
    run = ["--folder", str(cases), "--pairs", "lora", "--ways", "recent 10 %", "selected 5 %", "--contexts"]
    with pytest.raises(KeyboardInterrupt):
        selected.main([*run, "2"])
    assert {row["context"] for row in read_csv(path)} == {"0"}, "what is written is whole contexts"
    before = read_csv(path)
    filled[:] = []
    selected.main([*run[:-1], "deviation 10 %", "--contexts", "2"])
    assert filled == ["deviation 10 %", "all reused", "selected 5 %", "recent 10 %", "deviation 10 %"]
    assert read_csv(path)[: len(before)] == before


def test_rows_of_other_models_are_refused(cases: Path, pair: pairs.LoadedPair, monkeypatch: pytest.MonkeyPatch) -> None:
    run = ["--folder", str(cases), "--pairs", "lora", "--contexts", "1", "--ways", "selected 5 %"]
    selected.main(run)
    path = cases / "lora" / "judged.csv"
    before = path.read_bytes()
    monkeypatch.setattr(pairs.NamedPair, "load", lambda self: replace(pair, sender=pair.receiver))
    with pytest.raises(ValueError, match=r"judged\.csv: expected rows of these models"):
        selected.main([*run, "--contexts", "2"])
    assert path.read_bytes() == before


def test_a_way_that_is_none_is_named(cases: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        selected.main(["--folder", str(cases), "--pairs", "lora", "--ways", "everything"])
    assert "got 'everything'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        selected.main(["--folder", str(cases), "--only", "page"])
    assert "--page: expected" in capsys.readouterr().err


def test_what_a_profile_found() -> None:
    def point(kl: float, *bands: tuple[int, int], **others: object) -> Point:
        plan = ds.Plan(bands, **others)
        rest = "project" if plan.project else "reuse"
        return Point(plan, rest, False, resolve(plan, 30).work, (kl,) * 3, (0.5,) * 3)

    model = ds.Fingerprint({"num_hidden_layers": 30}, {}, "float32", "0" * 64)
    costs = ds.CostModel((0, 1e-4, 0), (0, 1e-5, 0), (0.05, 0, 0), 4000, 1000, "made up", (100, 2000))
    points = [
        point(0.0, (0, 30)), point(0.4, (9, 15)), point(0.3, (18, 24)), point(0.1, (9, 12), (18, 21)),
        point(0.2, (3, 15)), point(0.1, (12, 24)), point(0.05, (0, 27)), point(0.2, (12, 21)),
        point(0.1, (9, 15), project="rest"), point(0.1, (9, 15), select=0.1),
    ]  # fmt: skip
    plain = ds.Frontier(model, model, None, tuple(points), (), costs, (1000,) * 3, 1, 3, 0)
    bands = selected.profiled("lora", plain)
    assert [way.name for way in bands] == ["band [18, 24)", "band [12, 24)"], "of 6 layers and of 12"
    assert all(way.name == str(way.plan) and way.maps is None for way in bands)
    *same, before = selected.profiled("far", plain)
    assert same == bands and before.plan == ds.Plan([(18, 21)], project="rest") and before.maps == pairs.RIDGE


# --- the page ---------------------------------------------------------------------------------------------------------------


def judged(way: str, kl: list[float], scores: list[float]) -> list[Row]:
    return [
        {"way": way, "context": str(number), "score": score, "exact": score, "same": 0.5, "kl": each}
        for number, (each, score) in enumerate(zip(kl, scores, strict=True))
    ]


def test_a_summary_is_over_the_contexts_of_each_way() -> None:
    rows = [
        *judged("full prefill", [0, 0, 0], [1.0, 0.5, 0.0]),
        *judged("all reused", [4, 4, 8], [0.0, 0.0, 0.0]),
        *judged("selected", [1, 2], [0.85, 0.65]),
    ]
    full, reused, some = selected_page.summary(rows)
    assert (full["of_full_prefill"], reused["lost"], reused["won"], reused["kl_median"]) == ("1", 2, 0, "4")
    assert (some["contexts"], some["lost"], some["won"]) == (2, 1, 1)
    assert (some["of_full_prefill"], some["of_reuse"]) == ("1", "0.375")


def test_time_for_a_divergence_is_interpolated_along_the_front() -> None:
    bands, seconds = torch.tensor([1.0, 0.1, 0.5, 0.001]), torch.tensor([1.0, 2.0, 3.0, 5.0])
    wanted = torch.tensor([2.0, 1.0, math.sqrt(0.1), 0.1, 0.01, 0.001, 0.0])
    found = selected_page.time_for(wanted, bands.expand(7, 4), seconds)
    # The band of 0.5 takes longer than that of 0.1, so from there the front goes on from 2 to 5 seconds.
    assert found.tolist() == pytest.approx([1.0, 1.0, 1.5, 2.0, 3.5, 5.0, 5.0])


def test_a_way_is_held_against_bands_on_the_same_contexts() -> None:
    rows = [
        *judged("all reused", [1, 1, 9], [0] * 3),
        *judged("band [1, 3)", [0.01, 0.01, 9], [0] * 3),
        *judged("selected", [0.1, 0.1], [0] * 2),
        *judged("better", [1e-4, 1e-4], [0] * 2),
    ]
    speeds = {"all reused": "10", "band [1, 3)": "2", "selected": "5", "better": "4"}
    times = [{"way": way, "tokens": "900", "ttft_speedup": speed} for way, speed in speeds.items()]
    some, better = selected_page.against_bands(rows, times)
    assert (some["way"], some["contexts"], some["at_least"], better["at_least"]) == ("selected", 2, False, True)
    assert (some["bands_faster"], some["times_longer"], better["times_longer"]) == ("3.33", "1.5", "2")
    assert selected_page.against_bands(rows, [times[2]]) == []


def test_the_file_of_a_page_is_read_as_it_was_written(tmp_path: Path) -> None:
    rows = [*judged("full prefill", [0, 0], [1, 1]), *judged("all reused", [1, 2], [0.5, 0.25])]
    write_csv(tmp_path / "judged.csv", rows)
    assert selected_page.summary(read_csv(tmp_path / "judged.csv")) == selected_page.summary(rows)
