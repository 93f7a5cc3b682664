"""vLLM's servers in processes of their own: their command lines, and how they are started, awaited and always ended."""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Self

import httpx2

SECONDS = 480  # until a server has compiled its model and started, or has answered
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_SERVER_DEV_MODE": "1",  # for /reset_prefix_cache
}


def plain(python: str, model: str, options: Sequence[str]) -> list[str]:
    """Return the command line of vLLM's own server."""
    return [python, "-m", "vllm.entrypoints.openai.api_server", "--model", model, *options]


def sharing(python: str, model: str, arguments: Sequence[str], options: Sequence[str]) -> list[str]:
    """Return the command line of ``droidspeak serve``.

    Args:
        arguments: of itself.
        options: that it hands to vLLM.
    """
    return [python, "-m", "droidspeak_ops.cli", "serve", model, *arguments, "--vllm", shlex.join(options)]


class Server:
    """A server, which is killed with all its processes at the end of a ``with`` statement.

    Args:
        command: makes its command line, given options of vLLM.
        options: more of them; the port is one that is free.
        scratch: folder for its log, and for what vLLM writes; without blanks in its name, which compilers are told it by.
        environment: variables beside those of this process.
    """

    def __init__(
        self,
        command: Callable[[Sequence[str]], Sequence[str]],
        options: Sequence[str],
        scratch: Path,
        environment: Mapping[str, str],
    ) -> None:
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        scratch.mkdir(parents=True, exist_ok=True)
        self._log = scratch / "log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                command(["--port", str(port), *options]),
                env=os.environ | ENVIRONMENT | {"VLLM_CACHE_ROOT": str(scratch)} | environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # its engine is a process of its own, and is to be killed with it
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def wait(self, seconds: float = SECONDS) -> None:
        """Wait until it answers.

        Raises:
            RuntimeError: it has ended, or does not answer in time; the message has the end of its log.
        """
        end = time.monotonic() + seconds
        while self._process.poll() is None and time.monotonic() < end:
            try:
                httpx2.get(f"{self.url}/health", timeout=5).raise_for_status()
            except httpx2.HTTPError:
                time.sleep(0.5)
            else:
                return
        self.kill()
        log = self._log.read_text(errors="replace")
        raise RuntimeError(f"vLLM: expected a server within {seconds:g} s, got: {log[-3000:]}")

    def counted(self) -> dict[str, float]:
        """Return the connector's counters on the Prometheus endpoint, by name."""
        answer = httpx2.get(f"{self.url}/metrics", timeout=SECONDS).raise_for_status()
        found = re.findall(r"^droidspeak_(\w+)_total\{.*\} (\S+)$", answer.text, re.MULTILINE)
        return {name: float(value) for name, value in found}

    def forget(self) -> None:
        """Empty its prefix cache.

        Raises:
            RuntimeError: requests go on to hold pages.
        """
        for _ in range(20):  # those of requests that have just ended are let go in the step behind
            answer = httpx2.post(f"{self.url}/reset_prefix_cache", timeout=SECONDS).raise_for_status()
            if answer.json()["success"]:
                return
            time.sleep(0.5)
        raise RuntimeError(f"{self.url}: expected no request to hold pages, got some that do")

    def kill(self) -> None:
        """Kill all its processes, if it is still there."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
