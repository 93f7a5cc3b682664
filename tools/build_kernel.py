"""Build the operators alone for the PyPI library `kernels`, without the package around them.

    python tools/build_kernel.py OUT        # then kernels.get_local_kernel(Path(OUT))

Writes what that library's kernel-builder makes of a pure Python kernel: for each backend in build.toml a folder
``OUT/build/torch-BACKEND`` with an ``__init__.py``, a ``metadata.json`` and the operators' sources. kernel-builder itself
wants the sources under ``torch-ext/`` and the root's pyproject.toml to be its own.

A build registers its operators in a namespace that is named after the digest of its sources, so that one process can load
it beside the installed package and beside other builds.
"""

from __future__ import annotations

import argparse
import ast
import base64
import hashlib
import json
import re
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "droidspeak_ops"
NAMESPACE = "ops/namespace.py"

INIT = '''"""{description}"""

from ._version import __version__
from .ops import {names}

__all__ = {exported}
'''


def relative_imports(file: Path) -> Iterator[Path]:
    """The files that `file` imports relatively, at its top or in a function."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            source = file.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            modules = [source / alias.name for alias in node.names] if source.is_dir() else [source]
            yield from (module.with_suffix(".py") for module in modules)


def operator_sources() -> dict[str, str]:
    """Each file that the operators need, by its path in the package.

    Imports are followed and not listed, so a new module comes along by itself. One that is no plain module fails here, as
    a file that is not found: what the package's ``__init__.py`` imports has no place in a build.
    """
    files, waiting = set(), [PACKAGE / "ops" / "__init__.py", PACKAGE / "_version.py"]
    while waiting:
        file = waiting.pop()
        if file not in files:
            files.add(file)
            waiting += relative_imports(file)
    return {file.relative_to(PACKAGE).as_posix(): file.read_text(encoding="utf-8") for file in sorted(files)}


def public_names(ops: str) -> list[str]:
    """``__all__`` of the operators' source, read without importing torch."""
    assignments = (node for node in ast.parse(ops).body if isinstance(node, ast.Assign))
    return next(ast.literal_eval(node.value) for node in assignments if ast.unparse(node.targets[0]) == "__all__")


def build(out: Path) -> list[Path]:
    """Write a folder for each backend under ``out/build``, over one that is there, and return the folders."""
    general = tomllib.loads((ROOT / "build.toml").read_text(encoding="utf-8"))["general"]
    module = general["name"].replace("-", "_")
    sources = operator_sources()
    names = public_names(sources["ops/__init__.py"])
    sources["__init__.py"] = INIT.format(
        description=(ast.get_docstring(ast.parse(sources["ops/__init__.py"])) or "").partition("\n")[0],
        names=", ".join(names),
        exported=json.dumps([*names, "__version__"]),  # a literal: kernel-builder reads it without importing it
    )
    digest = hashlib.sha256(json.dumps(sources, sort_keys=True).encode()).hexdigest()[:8]

    variants = []
    for backend in general["backends"]:
        identifier = f"_{module}_{backend}_{digest}"  # also the name under which the loader imports the folder
        renamed, count = re.subn(r"(?m)^NAMESPACE = .*$", f'NAMESPACE = "{identifier}"', sources[NAMESPACE])
        if count != 1:
            raise ValueError(f"{NAMESPACE}: expected one assignment of NAMESPACE, got {count}")
        texts = {**sources, NAMESPACE: renamed}
        metadata = {
            "name": general["name"],
            "id": identifier,
            "version": general["version"],
            "license": general["license"],
            "python-depends": general.get("python-depends", []),
            "backend": {"type": backend},
            "digest": {"algorithm": "sha256", "files": {path: _digest(text) for path, text in texts.items()}},
        }
        variant = out / "build" / f"torch-{backend}"
        if variant.exists():
            shutil.rmtree(variant)
        for path, text in {**texts, "metadata.json": json.dumps(metadata, indent=2) + "\n"}.items():
            (variant / path).parent.mkdir(parents=True, exist_ok=True)
            (variant / path).write_text(text, encoding="utf-8", newline="\n")
        variants.append(variant)
    return variants


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to pass to kernels.get_local_kernel")
    for built in build(parser.parse_args().out):
        print(built)
