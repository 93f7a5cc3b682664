"""The kernels are found however the package is installed, and the folder that holds them shadows nothing."""

import ast
import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import droidspeak_ops as ds

ROOT = Path(__file__).parent.parent
CHECK = (
    "import droidspeak_ops, droidspeak_ops.kernels.project_splice as kernel, importlib.util, sys;"
    "assert not any(name.split('.')[0] == 'transformers' for name in sys.modules), 'transformers is imported lazily';"
    "print(droidspeak_ops.__file__, kernel.__file__, importlib.util.find_spec('kernels').origin, sep='\\n')"
)


def locations(python: str, cwd: Path, *options: str) -> list[Path]:
    """Where an interpreter finds the package, a kernel, and the PyPI package `kernels`."""
    out = subprocess.run([python, *options, "-c", CHECK], cwd=cwd, check=True, capture_output=True, text=True).stdout
    return [Path(line).resolve() for line in out.split()]


def test_the_folder_of_kernels_is_no_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert (ROOT / "droidspeak_ops" / "kernels").is_symlink()
    assert (ROOT / "droidspeak_ops" / "kernels").readlink() == Path("../kernels")


def test_the_package_named_kernels_is_the_one_from_pypi() -> None:
    """transformers imports it, also when Python runs in the repository's root."""
    origins = [Path(importlib.util.find_spec("kernels").origin).resolve(), locations(sys.executable, ROOT)[2]]
    for origin in origins:
        assert origin.name == "__init__.py"
        assert not origin.is_relative_to(ROOT / "kernels")


def test_from_the_source_tree() -> None:
    package, kernel, _ = locations(sys.executable, ROOT)
    assert package == ROOT / "droidspeak_ops" / "__init__.py"
    assert kernel == ROOT / "kernels" / "project_splice.py"


def test_installed(tmp_path: Path) -> None:
    """As installed in this environment (editable or not), seen from elsewhere."""
    package, kernel, _ = locations(sys.executable, tmp_path)
    assert package.name == "__init__.py"
    assert kernel.name == "project_splice.py"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--outdir", str(out), str(ROOT)], check=True, capture_output=True
    )
    return next(out.glob("*.whl"))


def test_wheel(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    assert not any(name.startswith("kernels/") for name in names)
    for name in ("kernels/project_splice.py", "kernels/row_norm.py", "kernels/kv_splice.py", "py.typed"):
        assert f"droidspeak_ops/{name}" in names
    for name in ("adapter_config.json", "adapter_model.safetensors", "calibration.json", "test.json"):
        assert f"droidspeak_ops/demo/glossary/{name}" in names
    site = tmp_path / "site"
    out = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(site)!r}); {CHECK}"],
        cwd=tmp_path, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    package, kernel, _ = (Path(line).resolve() for line in out.split())
    assert package.is_relative_to(site)
    assert kernel.is_relative_to(site)


def test_what_needs_no_transformers_does_not_import_it() -> None:
    needless = (
        "ops",
        "context.context",
        "context.loading",
        "context.store",
        "prefill.fill",
        "prefill.plan",
        "profiling.frontier",
        "proof.shapes",
    )
    imports = "; ".join(f"import droidspeak_ops.{name}" for name in needless)
    subprocess.run(
        [sys.executable, "-c", f"import sys; {imports}; assert 'transformers' not in sys.modules"], cwd=ROOT, check=True
    )


def test_only_hf_imports_transformers() -> None:
    """Not even for type checkers."""
    for file in [*(ROOT / "droidspeak_ops").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]:
        if "hf" not in file.relative_to(ROOT).parts:
            lines = file.read_text(encoding="utf-8").splitlines()
            assert not [
                line for line in lines if line.split()[:2] in (["import", "transformers"], ["from", "transformers"])
            ], file


def test_kernels_import_nothing_of_ours() -> None:
    """They are no package, so that the other contracts on imports do not see them."""
    allowed = {*sys.stdlib_module_names, "torch", "triton"}
    for file in (ROOT / "kernels").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1 and (ROOT / "kernels" / f"{node.module}.py").is_file(), file
            elif isinstance(node, ast.ImportFrom | ast.Import):
                names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                assert {name.partition(".")[0] for name in names} <= allowed, f"{file}: {names}"


def test_every_public_name_is_found() -> None:
    for name in ds.__all__:
        assert getattr(ds, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'filling'"):
        _ = ds.filling
