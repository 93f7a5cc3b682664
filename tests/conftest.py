"""Kernels run on the GPU where there is one, and in Triton's interpreter elsewhere; the tests are the same."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from support import support_table

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is imported
    from support.interpreter import correct_interpreter

    correct_interpreter()
else:
    # References are computed on the GPU too, so they must be as exact as the tolerances suppose.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False

_support = support_table.SupportTable()
_THREADS = torch.get_num_threads()


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if HAS_GPU else "cpu")


@pytest.fixture
def store(tmp_path: Path) -> Any:
    """An empty store of contexts."""
    import droidspeak_ops as ds

    return ds.ContextStore(tmp_path / "store")


@pytest.fixture(autouse=True)
def _seed_and_threads(request: pytest.FixtureRequest) -> None:
    torch.manual_seed(0)
    # Threads that wait for each other are all that a tiny model's time goes to, if other work runs on the machine.
    torch.set_num_threads(_THREADS if request.node.get_closest_marker("real") else 1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--write-support-table", action="store_true", help="write what works with which family to docs/models.md"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not HAS_GPU:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
        if marker := item.get_closest_marker("feature"):
            item.user_properties.append(("feature", (marker.args[0], item.callspec.params["family"])))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if "feature" in (properties := dict(report.user_properties)):
        _support.add(*properties["feature"], report)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """The table in the documentation is that of the tests."""
    from support.models import FAMILIES

    if not _support.is_complete(sorted(FAMILIES)):
        return
    table = _support.markdown(sorted(FAMILIES))
    if session.config.getoption("--write-support-table"):
        support_table.write(table)
    elif table != support_table.documented():
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        session.config.pluginmanager.get_plugin("terminalreporter").write_line(
            f"\n{support_table.PAGE} has another table than the tests; pytest --write-support-table writes it"
        )
