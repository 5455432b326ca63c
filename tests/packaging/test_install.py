"""Real installs, regular and editable, into a fresh environment that borrows this one's packages."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOT_SOURCE = shutil.ignore_patterns(
    ".*_cache", ".git", ".venv", "__pycache__", "*.egg-info", "*.so", "_built_with_torch.txt", "build", "dist", "runs"
)
USES_EVERYTHING = """
import torch, nesterov_pp, nesterov_pp.triton_kernels
assert nesterov_pp.kernels.available_backends()["cpu"] is None, nesterov_pp.kernels.available_backends()
weight = torch.nn.Parameter(torch.ones(5))
weight.grad = torch.ones(5)
nesterov_pp.NAdam([weight], lr=0.1, backend="cpu").step()
assert (weight < 1).all()
"""

pytestmark = pytest.mark.slow


class Environment:
    """A checkout, and a virtual environment that it is installed into."""

    def __init__(self, folder: Path, *how: str) -> None:
        self.checkout = folder / "checkout"
        self.elsewhere = folder / "elsewhere"
        self.elsewhere.mkdir()
        shutil.copytree(ROOT, self.checkout, ignore=NOT_SOURCE)
        venv.create(folder / "venv", with_pip=False)
        self.python = folder / "venv" / "bin" / "python"
        (site,) = folder.glob("venv/lib/python*/site-packages")
        # A .pth file only adds folders, so an editable install in one of them stays invisible.
        borrowed = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
        (site / "borrowed.pth").write_text("\n".join(borrowed))
        self.run(self.elsewhere, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-build-isolation", *how)

    def run(self, cwd: Path, *arguments: str) -> str:
        variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        result = subprocess.run(
            [str(self.python), *arguments],
            cwd=cwd,
            env={**variables, "NPP_WERROR": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stdout
        return result.stdout


@pytest.fixture(scope="module", params=["regular", "editable"])
def environment(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    folder = tmp_path_factory.mktemp(request.param)
    return Environment(folder, *(["-e"] if request.param == "editable" else []), str(folder / "checkout"))


@pytest.mark.parametrize("place", ["checkout", "elsewhere"])
def test_it_works_from_any_folder(environment: Environment, place: str) -> None:
    environment.run(getattr(environment, place), "-c", USES_EVERYTHING)


def test_it_works_under_pytest_in_the_checkout(environment: Environment) -> None:
    test = environment.checkout / "tests" / "test_uses_everything.py"
    test.write_text("def test():\n" + "".join(f"    {line}\n" for line in USES_EVERYTHING.splitlines()))
    name = str(test.relative_to(environment.checkout))
    assert "1 passed" in environment.run(environment.checkout, "-m", "pytest", name)
    assert "1 passed" in environment.run(
        environment.checkout, "-c", "import sys, pytest; sys.path.pop(0); sys.exit(pytest.main(sys.argv[1:]))", name
    )


def test_there_is_no_top_level_triton_kernels_of_ours(environment: Environment) -> None:
    spec = environment.run(
        environment.elsewhere, "-c", "import importlib.util; print(importlib.util.find_spec('triton_kernels'))"
    )
    assert str(environment.checkout) not in spec
    assert "nesterov_pp" not in spec
