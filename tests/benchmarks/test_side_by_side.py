"""Test files run side by side: which ones run, how outcomes are counted, what is reported."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = {
    "test_good.py": "import pytest\ndef test_a(): pass\n@pytest.mark.skip\ndef test_b(): pass\n",
    "test_bad.py": "def test_c(): assert 1 == 2\ndef test_d(): pass\n",
    "test_broken.py": "import no_such_module\n",
    "inner/test_deep.py": "def test_a(): pass\n",
    "helper.py": "raise SystemExit(3)\n",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def command(*arguments: object) -> list[str]:
    # Leave out this project's own pytest settings.
    plain = ("-q", "-p", "no:cacheprovider", "-c", os.devnull)
    return [sys.executable, "-m", "benchmarks.side_by_side", *map(str, arguments), "--", *plain]


def ran(*arguments: object, more: tuple[str, ...] = ()) -> tuple[int, str]:
    done = subprocess.run([*command(*arguments), *more], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_the_outcomes_of_all_files_are_counted_and_failures_shown(folder):
    status, output = ran(folder)
    assert status == 1
    last = output.splitlines()[-1]
    assert last.startswith("1 failed, 1 error, 3 passed, 1 skipped in "), last
    assert last.endswith("; 4 of 4 files")
    assert "assert 1 == 2" in output
    assert "no_such_module" in output
    assert f"{folder / 'test_good.py'}: exit" not in output


def test_files_can_be_left_out_and_tests_chosen(folder):
    left_out = ("--ignore", folder / "inner", folder / "test_bad.py", folder / "test_broken.py")
    assert ran(folder, *left_out)[1].startswith("1 passed, 1 skipped in ")
    status, output = ran(folder / "test_good.py", folder / "inner", more=("-k", "test_b"))
    assert status == 0
    assert output.startswith("1 skipped, 2 deselected in "), output


def test_a_path_that_is_not_there_is_named(folder):
    status, output = ran(folder / "nothing")
    assert status == 2
    assert f"{folder / 'nothing'} does not exist" in output


def test_an_interrupted_run_counts_what_was_done(folder):
    begun, late = folder / "begun", folder / "inner" / "test_late.py"
    late.write_text(f"import pathlib, time\ndef test_e(): pathlib.Path({str(begun)!r}).touch(); time.sleep(60)\n")
    (folder / "test_good.py").write_text(FILES["test_good.py"] + "# large, so that it comes first\n" * 100)
    paths = (folder / "test_good.py", late, "--processes", 1)
    process = subprocess.Popen(
        command(*paths), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    while not begun.exists():
        assert process.poll() is None
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "Not passed: interrupted" in output
    assert output.splitlines()[-1].startswith("1 passed, 1 skipped in ")
