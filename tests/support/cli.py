"""Models and texts for commands, right ones and wrong ones."""

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from support.models import fine_tuned, save_with_tokenizer, tiny_llama, tiny_pair, tokens

LAYERS = 4
PAIR = "sender receiver good.jsonl"


def words(count: int) -> str:
    return " ".join(f"w{number}" for number in tokens(count, vocabulary=100)[0].tolist())


def json_lines(count: int = 4, **changes: str) -> str:
    examples = ({"context": words(40), "suffix": words(5), "answer": words(4)} | changes for _ in range(count))
    return "".join(json.dumps(each) + "\n" for each in examples)


def copied(source: str, target: str, **changes: object) -> Path:
    """A copy of a model with changes of its configuration, None to take a value away."""
    folder = Path(shutil.copytree(source, target))
    if changes:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8")) | changes
        config = {name: value for name, value in config.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def adapter(base: torch.nn.Module, folder: str, recorded: str | None) -> None:
    """Save a LoRA adapter that names `recorded` as its base."""
    from peft import LoraConfig, get_peft_model

    made = get_peft_model(fine_tuned(base, 0), LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    made.save_pretrained(folder, save_embedding_layers=False)  # else PEFT asks the hub for the base
    config = Path(folder) / "adapter_config.json"
    config.write_text(
        json.dumps(json.loads(config.read_text(encoding="utf-8")) | {"base_model_name_or_path": recorded}),
        encoding="utf-8",
    )


def make_inputs(root: Path) -> None:
    """Make the models and texts in a folder."""
    torch.manual_seed(0)
    before = Path.cwd()
    os.chdir(root)
    try:
        sender, receiver = tiny_pair(layers=LAYERS)
        save_with_tokenizer(sender, Path("sender"))
        save_with_tokenizer(receiver, Path("receiver"))
        save_with_tokenizer(tiny_llama(head_dim=16, layers=3), Path("shallow"))
        adapter(sender, "orphan", "/where/it/was")
        adapter(sender, "nameless", None)
        adapter(sender, "child", "sender")
        adapter(tiny_llama(head_dim=16, layers=LAYERS, hidden_size=32), "narrow", "/where/it/was")
        adapter(tiny_llama(head_dim=16, layers=6), "deep", "/where/it/was")
        _broken_models()
        _texts()
    finally:
        os.chdir(before)


def _broken_models() -> None:
    for name, file in (
        ("no-config", "config.json"),
        ("no-weights", "model.safetensors"),
        ("no-tokens", "tokenizer.json"),
    ):
        (copied("sender", name) / file).unlink()
    for name, file in (
        ("bad-config", "config.json"),
        ("bad-weights", "model.safetensors"),
        ("bad-tokens", "tokenizer.json"),
    ):
        path = copied("sender", name) / file
        path.write_bytes(path.read_bytes()[:-99])
    weights = load_file("sender/model.safetensors")
    del weights["model.layers.2.mlp.up_proj.weight"]
    save_file(weights, copied("sender", "lacking") / "model.safetensors", {"format": "pt"})
    copied("sender", "wider", intermediate_size=96)
    copied("sender", "gpt2", model_type="gpt2")
    copied("sender", "unknown", model_type="nonesuch")
    copied("sender", "untyped", model_type=None, architectures=None)
    copied("sender", "worded", num_hidden_layers="four")
    copied("sender", "few-heads", num_key_value_heads=4)
    copied("sender", "small-vocabulary", vocab_size=50)
    tokenizer = copied("sender", "other-tokens") / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text(encoding="utf-8").replace('"w7"', '"v7"'), encoding="utf-8")
    (copied("orphan", "bad-adapter") / "adapter_model.safetensors").write_bytes(b"no tensors")
    (copied("orphan", "bad-adapter-config") / "adapter_config.json").write_text("{", encoding="utf-8")


def _texts() -> None:
    for name in ("text.txt", "other.txt"):
        Path(name).write_text(words(450), encoding="utf-8")
    Path("short.txt").write_text(words(70), encoding="utf-8")
    Path("empty.txt").write_text("", encoding="utf-8")
    Path("blank.txt").write_text(" \n\n", encoding="utf-8")
    Path("latin.txt").write_bytes(b"caf\xe9 " * 99)
    Path("good.jsonl").write_text(json_lines(), encoding="utf-8")
    good = json_lines(1)
    Path("array.jsonl").write_text(good + "[1]\n", encoding="utf-8")
    Path("field.jsonl").write_text(good + json.dumps({"context": "w1", "suffix": "w2"}), encoding="utf-8")
    Path("more.jsonl").write_text(json_lines(1, note="w1"), encoding="utf-8")
    Path("number.jsonl").write_text(json_lines(1, answer=7), encoding="utf-8")
    Path("cut.jsonl").write_text(json_lines(2)[:-9], encoding="utf-8")
    Path("gap.jsonl").write_text(good + "\n" + good, encoding="utf-8")
    for name in ("context", "suffix", "answer"):
        Path(f"no-{name}.jsonl").write_text(good + json_lines(1, **{name: ""}), encoding="utf-8")
    Path("spaces.jsonl").write_text(good + json_lines(1, suffix="  "), encoding="utf-8")
    Path("half.jsonl").write_text(json_lines(1, answer="\ud800"), encoding="utf-8")
    Path("twice.jsonl").write_text(
        '{"context": "w1", "context": "w2", "suffix": "w1", "answer": "w1"}', encoding="utf-8"
    )
    Path("folder").mkdir()
    Path("taken/frontier.json").mkdir(parents=True)
    Path("a-file").write_text("w1", encoding="utf-8")
