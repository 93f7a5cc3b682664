"""``droidspeak profile`` on a tiny pair: files, plots, a page, scores."""

import json

import pytest
from support.models import save_with_tokenizer, tokens
from support.profiles import COSTS

import droidspeak_ops as ds
from droidspeak_ops.cli import main
from droidspeak_ops.profiling import run as profiling


def words(count: int) -> str:
    return " ".join(f"w{number}" for number in tokens(count, vocabulary=100)[0].tolist())


@pytest.fixture
def named(pair, tmp_path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The pair as folders, to be timed as if it had been."""
    monkeypatch.setattr(profiling, "measure_costs", lambda *args, **options: COSTS)
    return [save_with_tokenizer(model, tmp_path / str(number)) for number, model in enumerate(pair)]


def test_the_command_profiles_with_maps(named, maps, tmp_path, capsys) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text(words(500), encoding="utf-8")
    maps.save(tmp_path / "maps.safetensors")
    options = ["--tokens", "100", "--granularity", "2", "--maps", str(tmp_path / "maps.safetensors"), "--out", str(out)]
    main(["profile", *named, str(text), *options])
    assert {path.name for path in out.iterdir()} == {
        "frontier.json", "report.html", "frontier.png", "quality.png", "bands.png", "sensitivity.png",
    }  # fmt: skip
    frontier = ds.Frontier.load(out / "frontier.json")
    assert frontier.contexts == (67,) * 5
    assert frontier.maps == maps.digest()
    said = capsys.readouterr().out.replace("\n", "")  # the console wraps long paths
    assert "faster" in said and "report.html" in said
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 4
    assert "<td>10%</td>" in page and 'src="http' not in page


def test_the_command_scores_answers(named, tmp_path) -> None:
    lines = [json.dumps({"context": words(40), "suffix": words(5), "answer": words(4)}) for _ in range(4)]
    (tmp_path / "some.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    main(
        ["profile", *named, str(tmp_path / "some.jsonl"), "--metric", "edit similarity", "--out", str(tmp_path / "out")]
        + ["--granularity", "2"]
    )
    frontier = ds.Frontier.load(tmp_path / "out" / "frontier.json")
    assert len(frontier.scores) == 4 and all(0 <= score <= 1 for score in frontier.scores)
