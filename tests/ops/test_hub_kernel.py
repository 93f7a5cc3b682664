"""The operators load through the PyPI library `kernels`, beside the installed package and beside another build."""

import ast
import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

# Not `kernels` alone: without the package from PyPI, the folder of that name in the repository's root would be found.
pytest.importorskip("kernels._rust")
from kernels._rust import Build
from kernels.validate import AllValidator, default_metadata_validators
from kernels.variants import get_variants_local
from kernels.verify import Digest, Metadata

ROOT = Path(__file__).parents[2]
BACKENDS = tomllib.loads((ROOT / "build.toml").read_text(encoding="utf-8"))["general"]["backends"]

# Loads each folder that it is given, then the package; prints the namespaces and compares the caches that they fill.
COMPARE = """
import importlib
import sys
from pathlib import Path

import torch
from kernels import get_local_kernel

builds = [get_local_kernel(Path(path)) for path in sys.argv[1:]]
assert "droidspeak_ops" not in sys.modules, "a build imports the package"
import droidspeak_ops

B, K, T, D, C = 2, 2, 5, 8, 16
torch.manual_seed(0)
x, k_weight, v_weight, norm_weight = torch.randn(T, C), torch.randn(K * D, C), torch.randn(K * D, C), torch.randn(C)
k, v, angle, slots = torch.randn(B, K, T, D), torch.randn(B, K, T, D), torch.randn(B * T, D // 2), torch.arange(B * T)
rotation = {"cos": angle.cos(), "sin": angle.sin()}


def run(ops):
    caches = [torch.full((B, K, T, D), float("nan")) for _ in range(4)]
    first = {name: tensor[:T] for name, tensor in rotation.items()}
    ops.kv_project(ops.Projection(x, k_weight, v_weight, *caches[:2], slots[:T], norm_weight=norm_weight, **first))
    ops.kv_splice(k, v, *caches[2:], slots, **rotation)
    peaks, out = torch.zeros(B, T), torch.empty(B, T, 2 * K, D)
    q, key_slots = k.transpose(1, 2).repeat_interleave(2, 2), slots.view(B, T)
    places = key_slots, key_slots % T
    ops.attention_peaks(q, caches[2], *places, peaks, scale=0.5)
    ops.attend_rows(q, *caches[2:], *places, out, scale=0.5)
    bits = torch.stack(caches).view(torch.int32)  # so that untouched rows compare too
    return torch.cat([bits.flatten(), peaks.view(torch.int32).flatten(), out.view(torch.int32).flatten()])


expected = run(droidspeak_ops.ops)
for build in builds:
    assert build.__all__ == [*droidspeak_ops.ops.__all__, "__version__"]
    assert build.__version__ == droidspeak_ops.__version__
    assert torch.equal(run(build), expected), build
    kernels = [file.stem for file in (Path(build.__file__).parent / "kernels").glob("*.py")]
    at_first_launch = {"attend_rows", "attention_peaks", "kv_splice", "project_splice", "row_norm"}
    assert at_first_launch <= set(kernels)
    for name in kernels:
        importlib.import_module(f"{build.__name__}.kernels.{name}")
print(droidspeak_ops.ops.namespace.NAMESPACE, *(build.ops.namespace.NAMESPACE for build in builds))
"""


def build(root: Path, out: Path) -> Path:
    subprocess.run([sys.executable, str(root / "tools" / "build_kernel.py"), str(out)], check=True, capture_output=True)
    return out


def python(*arguments: str, cwd: Path) -> str:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(ROOT, tmp_path_factory.mktemp("kernel"))


def test_loads_beside_the_package_and_another_version(kernel: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    for folder in ("droidspeak_ops", "tools"):
        shutil.copytree(ROOT / folder, other / folder, ignore=shutil.ignore_patterns("demo"))
    shutil.copy(ROOT / "build.toml", other)
    with (other / "droidspeak_ops" / "ops" / "reference.py").open("a", encoding="utf-8") as file:
        file.write("# a change\n")

    namespaces = python(COMPARE, str(kernel), str(build(other, tmp_path / "out")), cwd=tmp_path).split()
    assert len(set(namespaces)) == 3
    assert namespaces[0] == "droidspeak_ops"


def test_the_library_accepts_build_toml_and_every_variant(kernel: Path) -> None:
    assert [str(backend).lower() for backend in Build.open(ROOT).general.backends] == BACKENDS
    variants = get_variants_local(kernel / "build")
    assert sorted(variant.variant_str for variant in variants) == [f"torch-{backend}" for backend in sorted(BACKENDS)]
    for variant in variants:
        folder = kernel / "build" / variant.variant_str
        metadata = Metadata.read_from_file(folder / "metadata.json")
        AllValidator(default_metadata_validators()).validate_metadata(metadata=metadata, variant=folder.name)
        assert metadata.id.isidentifier()
        assert f'"{metadata.id}"' in (folder / "ops" / "namespace.py").read_text(encoding="utf-8")
        metadata.digest.validate(Digest.hash_variant(metadata.digest.algorithm, folder))


def test_the_command_line_describes_it(kernel: Path, tmp_path: Path) -> None:
    output = python("from kernels.cli import main; main()", "info", "--json", str(kernel), cwd=tmp_path)
    info = json.loads(output)
    assert (info["name"], info["license"], info["backends"]) == ("droidspeak-ops", "Apache-2.0", sorted(BACKENDS))


def test_imports_nothing_but_itself_torch_and_triton(kernel: Path) -> None:
    allowed = {*sys.stdlib_module_names, "torch", "triton"}
    for file in kernel.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            assert {name.partition(".")[0] for name in names} <= allowed, f"{file}: {names}"
