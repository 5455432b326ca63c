"""The metadata of the package, and the requirements of its build."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import tarfile
from importlib import metadata
from pathlib import Path

import pytest
from setuptools import build_meta

import nesterov_pp

ROOT = Path(__file__).resolve().parents[2]


def python(*arguments: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, check=False)


def test_the_installed_version_is_the_one_the_package_names() -> None:
    assert metadata.version("nesterov-pp") == nesterov_pp.__version__


def test_torch_is_asked_for_as_a_range_and_never_by_the_build(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = metadata.requires("nesterov-pp") or []
    assert "torch>=2.9" in runtime
    monkeypatch.chdir(ROOT)
    build_table = re.search(r"^\[build-system\]$(.*?)^\[", Path("pyproject.toml").read_text(), re.M | re.S)
    assert build_table is not None
    declared = re.search(r"^requires = \[(.*)\]$", build_table[1], re.M)
    assert declared is not None
    assert "setuptools" in declared[1]
    assert "torch" not in declared[1]
    assert not [name for name in build_meta.get_requires_for_build_wheel() if "torch" in name]


def test_a_build_environment_without_torch_is_told_in_one_sentence_what_to_do() -> None:
    result = python("-c", "import runpy, sys; sys.modules['torch'] = None; runpy.run_path('setup.py')")
    assert result.returncode == 1
    assert result.stderr.splitlines() == [
        "nesterov_pp builds against the torch it will run with, but this build environment has none: "
        "install torch first, then run `pip install --no-build-isolation .`"
    ]


def test_the_triton_kernels_are_a_part_of_the_package(tmp_path: Path) -> None:
    ours = importlib.import_module("nesterov_pp.triton_kernels")
    assert ours.__file__ is not None
    # Run in another folder, so that the checkout's folder of that name is not found.
    result = python(
        "-c", "import importlib.util as u; print(getattr(u.find_spec('triton_kernels'), 'origin', None))", cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() != str(Path(ours.__file__))


def test_a_source_distribution_holds_what_a_build_needs(tmp_path: Path) -> None:
    built = python("setup.py", "-q", "egg_info", "--egg-base", tmp_path, "sdist", "--dist-dir", tmp_path)
    assert built.returncode == 0, built.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as files:
        names = {name.partition("/")[2] for name in files.getnames()}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cpp")}
    assert sources
    assert {*sources, "setup.py", "pyproject.toml", "LICENSE", "triton_kernels/__init__.py"} <= names
    assert {"nesterov_pp/__init__.py", "nesterov_pp/py.typed"} <= names
    assert not [name for name in names if name.endswith((".so", "_built_with_torch.txt"))]
