"""``droidspeak store``: what it shows of a store, and what it says of mistakes and damage."""

from pathlib import Path

import pytest

import droidspeak_ops as ds
from bench.small_contexts import make_context, make_tokens
from droidspeak_ops.cli import main


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def store(tmp_path: Path) -> ds.ContextStore:
    store = ds.ContextStore(tmp_path / "store", namespace="a tenant")
    for length in (5, 70):
        store.save(make_context(make_tokens(length, seed=length)))
    return store


def output(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    main(["store", *arguments])
    return capsys.readouterr().out


def failure(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["store", *arguments])
    assert ended.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"droidspeak store {arguments[0]}: error: ")
    return said


def keys(store: ds.ContextStore) -> list[str]:
    return [store.open(each.name).manifest.key for each in store.stored()]


def test_ls(store: ds.ContextStore, capsys: pytest.CaptureFixture) -> None:
    said = output(capsys, "ls", store.url)
    for word in (
        *(key[:12] for key in keys(store)),
        "a tenant",
        "llama",
        "0" * 12,
        "float32",
        "seconds ago",
        "2 contexts",
    ):
        assert word in said
    assert "0 contexts" in output(capsys, "ls", f"{store.url}/nothing")


def test_show(store: ds.ContextStore, capsys: pytest.CaptureFixture) -> None:
    key = keys(store)[0]
    said = output(capsys, "show", store.url, key[:9])
    for word in (
        key,
        "a tenant",
        "3 layers, float32",
        "70",
        "whole, and by heads of whole blocks",
        "rope: rope_theta",
        "10000.0",
    ):
        assert word in said
    assert "key: expected the beginning of one context's key, got x, of 0" in failure(capsys, "show", store.url, "x")
    assert "got , of 2" in failure(capsys, "show", store.url, "")


def test_verify(store: ds.ContextStore, capsys: pytest.CaptureFixture) -> None:
    assert "2 contexts, 0.0 MiB: all as they were written" in output(capsys, "verify", store.url)
    one, other = (Path(store.url) / each.name for each in store.stored())
    content = one.read_bytes()
    one.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    said = failure(capsys, "verify", store.url)
    assert f"1 of 2 contexts cannot be read: {one}: kv.2.values: expected the digest" in said
    other.write_bytes(b"")
    assert "2 of 2 contexts cannot be read" in failure(capsys, "verify", store.url)
    assert "damaged" in output(capsys, "ls", store.url)


@pytest.mark.parametrize(("budget", "left"), [("1TiB", 2), ("30KiB", 2), ("0.0245 MiB", 1), ("0", 0)])
def test_prune(store: ds.ContextStore, capsys: pytest.CaptureFixture, budget: str, left: int) -> None:
    said = output(capsys, "prune", store.url, "--budget", budget)
    assert f"removed {2 - left} contexts" in said and f"{left} are left" in said
    assert len(store.stored()) == left


def test_mistakes(store: ds.ContextStore, capsys: pytest.CaptureFixture) -> None:
    for budget in ("-1", "many", "1GB", "1e3"):
        assert f"expected bytes, such as 500MiB or 20GiB, got '{budget}'" in failure(
            capsys, "prune", store.url, f"--budget={budget}"
        )
    assert "nowhere" in failure(capsys, "ls", "nowhere://contexts")
