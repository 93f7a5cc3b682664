"""The command line: ``droidspeak demo``, ``fit``, ``profile`` and ``compile``."""

from __future__ import annotations

import argparse
import sys
import warnings
from typing import NoReturn


def main(arguments: list[str] | None = None) -> None:
    """Run the ``droidspeak`` command.

    What a user can mend is one line on stderr and exit status 2, Ctrl-C one line and status 130. Any other exception is a fault
    of the program and keeps its traceback.
    """
    options = argparse.Namespace(prog="droidspeak", kept=lambda options: "no result was written")
    try:
        from .parser import make_parser  # imports torch, which takes seconds

        make_parser().parse_args(arguments, options)
        with warnings.catch_warnings():
            warnings.filterwarnings("always", category=UserWarning, module="droidspeak_ops")
            warnings.showwarning = lambda message, *_: _say(f"{options.prog}: warning: {message}")
            options.run(options)
    except OSError as error:
        named = error.filename is not None and error.strerror is not None
        _exit(2, f"{options.prog}: error: {f'{error.filename}: {error.strerror}' if named else error}")
    except ValueError as error:
        _exit(2, f"{options.prog}: error: {error}")
    except ModuleNotFoundError as error:
        module = (error.name or "droidspeak_ops").partition(".")[0]
        if module == "droidspeak_ops":
            raise
        _exit(2, f"{options.prog}: error: expected the module {module}; pip install 'droidspeak-ops[demo]' has it")
    except KeyboardInterrupt:
        _exit(130, f"{options.prog}: interrupted; {options.kept(options)}")


def _say(text: str) -> None:
    print(" ".join(text.split()), file=sys.stderr)


def _exit(status: int, text: str) -> NoReturn:
    _say(text)
    raise SystemExit(status)
