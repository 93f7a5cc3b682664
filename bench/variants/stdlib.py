"""Two tasks on the source of Python's standard library, which is wherever Python is: completing code, and saying what it does.

What is drawn of :data:`PACKAGES`, which stand beside it, is for maps to be trained on.

- Completion: the context is the source of a module up to some line, the suffix the next three lines, the answer the line after.
- Docs: the context is a chat turn that lists functions without their docstrings, the suffix asks what one of them does, the
  answer is the first line of its docstring.

Modules are split by a hash of their names, so no module is in two splits.
"""

from __future__ import annotations

import ast
import random
import sysconfig
import zlib
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from droidspeak_ops.example import TextExample

PACKAGES = ("fsspec", "hypothesis", "matplotlib", "numpy", "peft", "rich")
"""The split `"packages"`: packages that this one needs, in the versions of constraints.txt. No variant was trained on them."""

_LEFT_OUT = set("test tests idlelib lib2to3 site-packages pydoc_data encodings turtledemo __pycache__".split())
_SUFFIX_LINES = 3


@dataclass(frozen=True)
class Function:
    """A function of the library.

    Args:
        source: its text, without the docstring.
        summary: the docstring's first line.
    """

    name: str
    source: str
    summary: str


@cache
def read_modules(split: str) -> dict[str, str]:
    """Return source by module path.

    Of the library 70 % of the modules are to train on (`"train"`), 15 % to calibrate maps and plans on (`"calibration"`), and
    15 % to test on (`"test"`); `"packages"` are all modules of :data:`PACKAGES`.
    """
    if split == "packages":
        found = {f"{package}/{name}": path for package in PACKAGES for name, path in _modules(_folder(package)).items()}
    else:
        library = _modules(Path(sysconfig.get_path("stdlib")))
        found = {name: path for name, path in library.items() if _split(name) == split}
    return {name: path.read_text(encoding="utf-8", errors="replace") for name, path in found.items()}


def _folder(package: str) -> Path:
    """Where a package is, without importing it."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"expected the package {package}, got none; install it: pip install {package}")
    return Path(spec.origin).parent


def _modules(root: Path) -> dict[str, Path]:
    """Modules below a folder by their path in it, without tests and the like."""
    paths = {path.relative_to(root): path for path in sorted(root.rglob("*.py"))}
    return {name.as_posix(): path for name, path in paths.items() if _LEFT_OUT.isdisjoint(name.parts)}


def _split(name: str) -> str:
    bucket = zlib.crc32(name.encode()) % 20
    return "train" if bucket < 14 else "calibration" if bucket < 17 else "test"


@cache
def read_functions(split: str) -> list[Function]:
    """Return functions of 4 to 25 lines whose docstrings start with one sentence of 4 to 15 words."""
    found = []
    for text in read_modules(split).values():
        lines = text.split("\n")  # as ast counts them: splitlines() would also cut at the form feeds of older modules
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.FunctionDef) or node.name.startswith("__") or len(node.body) < 2:
                continue
            if doc := ast.get_docstring(node):
                summary = doc.splitlines()[0].strip()
                docstring = node.body[0]
                before = lines[node.lineno - 1 : docstring.lineno - 1]
                after = lines[docstring.end_lineno : node.end_lineno]
                if summary.endswith(".") and 4 <= len(summary.split()) <= 15 and 4 <= len(before + after) <= 25:
                    source = "\n".join(line[node.col_offset :] for line in before + after if line.strip())
                    found.append(Function(node.name, source, summary))
    return found


def draw_functions(split: str, characters: int, rng: random.Random) -> list[Function]:
    """Draw functions of different names that come to about so many characters together."""
    drawn: dict[str, Function] = {}
    total = 0
    for function in rng.sample(read_functions(split), len(read_functions(split))):
        if function.name not in drawn:
            drawn[function.name] = function
            total += len(function.source)
            if total >= characters:
                break
    return list(drawn.values())


def docs_context(functions: list[Function]) -> str:
    """Return a context that lists functions, as a chat turn."""
    listed = "\n\n".join(function.source for function in functions)
    return f"<|im_start|>user\nHere are some functions.\n\n{listed}<|im_end|>\n"


def docs_ask(function: Function) -> tuple[str, str]:
    """Return the question what a function does, as a chat turn that ends where the answer starts, and the answer."""
    question = f"What does the function `{function.name}` do?"
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n", function.summary


def draw_docs_examples(split: str, characters: int, questions: int, rng: random.Random) -> list[TextExample]:
    """Draw questions about one list of functions."""
    functions = draw_functions(split, characters, rng)
    context = docs_context(functions)
    return [
        TextExample(context, *docs_ask(function)) for function in rng.sample(functions, min(questions, len(functions)))
    ]


def draw_code_examples(split: str, characters: int, questions: int, rng: random.Random) -> list[TextExample]:
    """Draw a place to complete code at, behind a stretch of a module of about so many characters.

    For several questions the places lie further behind in the same module, as if the receiver had jumped there.
    """
    texts = [text for text in read_modules(split).values() if len(text) > 2 * characters]
    lines = _stretch(rng.choice(texts), 2 * characters, rng).splitlines(keepends=True)
    end, total = 0, 0
    while total < characters:
        total += len(lines[end])
        end += 1
    places = [at for at in range(end, len(lines) - _SUFFIX_LINES - 1) if _is_place(lines[at : at + _SUFFIX_LINES + 1])]
    if len(places) < questions:
        return draw_code_examples(split, characters, questions, rng)
    context = "".join(lines[:end])
    return [
        TextExample(context, "".join(lines[at : at + _SUFFIX_LINES]), lines[at + _SUFFIX_LINES].removesuffix("\n"))
        for at in (places[:1] if questions == 1 else rng.sample(places, questions))
    ]


def _is_place(lines: list[str]) -> bool:
    """Return whether there is code before the last of some lines, and something to complete in it."""
    return all(map(str.strip, lines)) and len(lines[-1].strip()) >= 12


def draw_code(split: str, characters: int, rng: random.Random) -> str:
    """Draw a stretch of a module."""
    texts = [text for text in read_modules(split).values() if len(text) > characters]
    return _stretch(rng.choice(texts), characters, rng)


def _stretch(text: str, characters: int, rng: random.Random) -> str:
    start = rng.randrange(max(len(text) - characters, 1))
    start = text.find("\n", start) + 1  # from the beginning of a line on
    return text[start : start + characters]
