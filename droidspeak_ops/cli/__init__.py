"""The command line: ``droidspeak demo``, ``fit``, ``profile``, ``store``, ``serve`` and ``compile``, a module each."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from importlib import import_module
from typing import Any, NoReturn


def main(arguments: list[str] | None = None) -> None:
    """Run the ``droidspeak`` command.

    What a user can mend is one line on stderr and exit status 2, Ctrl-C one line and status 130. Any other exception is a fault
    of the program and keeps its traceback.
    """
    prog, interrupted = "droidspeak", False
    command: Any = None

    def interrupt(*_: Any) -> None:
        nonlocal interrupted
        if command is None:  # a library that is being imported may make anything of an exception, an abort among it
            _say(f"{prog}: interrupted; no result was written")
            os._exit(130)
        interrupted = True
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        from .parser import make_parser

        options = make_parser().parse_args(arguments)
        prog = options.prog
        command = import_module(f".{options.command}", __package__)
        with warnings.catch_warnings():
            warnings.filterwarnings("always", category=UserWarning, module="droidspeak_ops")
            warnings.showwarning = lambda message, *_: _say(f"{prog}: warning: {message}")
            command.run(options)
    except BaseException as error:
        if interrupted or isinstance(error, KeyboardInterrupt):
            kept = command.kept(options) if hasattr(command, "kept") else "no result was written"
            _exit(130, f"{prog}: interrupted; {kept}")
        explanation = _explanation(error)
        if explanation is None:
            raise
        _exit(2, f"{prog}: error: {explanation}")
    finally:
        signal.signal(signal.SIGINT, before)


def _explanation(error: BaseException) -> str | None:
    """Return what a user can mend, or None for a fault of the program."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, OSError | ValueError):
        return str(error)
    if isinstance(error, ModuleNotFoundError):
        module = (error.name or "droidspeak_ops").partition(".")[0]
        if module != "droidspeak_ops":
            return f"expected the module {module}; pip install 'droidspeak-ops[demo]' has it"
    return None


def _say(text: str) -> None:
    print(" ".join(text.split()), file=sys.stderr)


def _exit(status: int, text: str) -> NoReturn:
    _say(text)
    raise SystemExit(status)
