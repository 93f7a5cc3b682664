"""A folder that commands run in."""

from pathlib import Path

import pytest
from support.cli import make_inputs


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of models and texts, right ones and wrong ones."""
    root = tmp_path_factory.mktemp("cli")
    make_inputs(root)
    return root


@pytest.fixture
def here(made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(made)
    return made
