"""The loader of the compiled extension: what it loads, and its messages when it cannot."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import nesterov_pp
from nesterov_pp.kernels import extension

load = extension.load.__wrapped__  # without the cache


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make an empty folder the only place where submodules of nesterov_pp are looked up."""
    monkeypatch.setattr(nesterov_pp, "__path__", [str(tmp_path)])
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delitem(sys.modules, "nesterov_pp._C", raising=False)
    return tmp_path


def built(folder: Path, *, torch_version: str, source: str) -> None:
    """Put a stand-in for the compiled extension into ``folder``."""
    (folder / "_C.py").write_text(source)
    (folder / "_built_with_torch.txt").write_text(torch_version + "\n")


def refusal() -> str:
    module, reason = load()
    assert module is None
    assert reason is not None
    return reason


def loaded() -> ModuleType:
    module, reason = load()
    assert reason is None
    assert module is not None
    return module


def test_the_extension_of_this_environment_loads() -> None:
    assert extension.load() == (loaded(), None)
    assert hasattr(loaded(), "Plan")


def test_without_an_extension_the_reason_says_how_to_build_one(package: Path) -> None:
    reason = refusal()
    assert f"nesterov_pp in {package} has no compiled extension" in reason
    assert "pip install --no-build-isolation" in reason


def test_an_extension_without_its_note_is_not_opened(package: Path) -> None:
    (package / "_C.py").write_text("raise AssertionError('opened')")
    assert "has no compiled extension" in refusal()


@pytest.mark.parametrize("version", ["2.9.1", "99.0.0+cpu"])
def test_an_extension_built_against_another_torch_is_not_opened(package: Path, version: str) -> None:
    built(package, torch_version=version, source="raise AssertionError('opened')")
    reason = refusal()
    assert f"built against torch {version}, but torch {torch.__version__} is running" in reason
    assert "pip install --no-build-isolation --force-reinstall --no-deps ." in reason


def test_a_patch_release_of_torch_is_the_same_torch(package: Path) -> None:
    major, minor = torch.__version__.split(".")[:2]
    built(package, torch_version=f"{major}.{minor}.99+other", source="answer = 42")
    assert loaded().answer == 42


def test_an_extension_that_cannot_be_opened_is_a_reason_not_an_exception(package: Path) -> None:
    built(package, torch_version=torch.__version__, source="raise ImportError('undefined symbol: x')")
    reason = refusal()
    assert "undefined symbol: x" in reason
    assert "pip install --no-build-isolation" in reason


def test_a_source_folder_in_front_of_an_installed_package_uses_its_extension(
    package: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path_factory.mktemp("site")
    installed = site / "nesterov_pp"
    installed.mkdir()
    (installed / "__init__.py").touch()
    built(installed, torch_version=torch.__version__, source="answer = 42")
    monkeypatch.setattr(sys, "path", [str(site)])
    assert loaded().answer == 42
    assert nesterov_pp.__path__ == [str(package), str(installed)]
