"""The machine that a measurement holds for."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import torch


def environment(device: torch.device | str | None = None) -> dict[str, str | int]:
    """Return what this machine is and runs, as texts and counts: for files, and for titles.

    Args:
        device: where a measurement runs; described too if it is given.

    Returns:
        ``cpu``, its model; ``architecture``; ``threads`` of torch; versions of ``python``, ``torch`` and, where it is
        installed, ``triton``. With a device ``device``, the GPU's name or how many CPU threads; of a GPU also ``cuda`` or
        ``rocm``, and ``driver`` where ``nvidia-smi`` tells it.
    """
    found: dict[str, str | int] = {
        "cpu": _cpu(),
        "architecture": platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
    }
    try:
        import triton
    except ImportError:
        pass
    else:
        found["triton"] = triton.__version__
    return found if device is None else {**_device(torch.device(device)), **found}


def _device(device: torch.device) -> dict[str, str]:
    if device.type != "cuda":
        return {"device": f"{torch.get_num_threads()} CPU threads"}
    toolkit = ("cuda", torch.version.cuda) if torch.version.hip is None else ("rocm", torch.version.hip)
    texts = (("device", torch.cuda.get_device_name(device)), ("driver", _nvidia_driver()), toolkit)
    return {name: text for name, text in texts if text}


def _nvidia_driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        printed = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return printed.partition("\n")[0].strip()


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.machine())
