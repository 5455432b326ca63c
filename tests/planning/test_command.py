"""``python -m nesterov_pp plan``."""

from __future__ import annotations

from itertools import count

import pytest
import torch
from torch import nn

from nesterov_pp.cli import main
from nesterov_pp.planning import StageCost, layers, measure_layers, memory_per_stage
from nesterov_pp.stash import FORMS, WeightStash

SMALL = ["--layers", "4", "--width", "32", "--heads", "2", "--context", "16", "--batch", "2"]


def test_the_table_and_what_fits(capsys):
    assert main(["plan", *SMALL, "--devices", "2,4", "--latency", "20", "--bandwidth", "1", "--memory", "1"]) == 0
    printed = capsys.readouterr().out
    rows = [line for line in printed.splitlines() if any(f" {s} " in line for s in ("async", "gpipe", "1f1b"))]
    assert len([line for line in rows if line.startswith("│")]) == 8  # async with and without slack
    assert "Fastest that fits: " in printed
    assert main(["plan", *SMALL, "--devices", "2", "--memory", "0.000001"]) == 0
    printed = capsys.readouterr().out
    assert "(too large)" in printed
    assert "Nothing fits: use more stages" in printed


@pytest.fixture
def even_times(monkeypatch):
    """Have all layers take equally long, so that stages hold the same ones however busy the machine is."""
    clock = count()
    monkeypatch.setattr(layers, "_now", lambda _: next(clock) / 1000)


@pytest.mark.usefixtures("even_times")
def test_the_state_of_the_methods_rule_is_counted(capsys):
    def largest(method: str) -> float:
        assert main(["plan", *SMALL, "--devices", "2", "--method", method]) == 0
        row = next(line for line in capsys.readouterr().out.splitlines() if " async " in line)
        return float(row.split("│")[-3].split()[0])

    assert largest("nesterov-sgd") < largest("nesterov") < largest("nesterov-rotated")


@pytest.mark.usefixtures("even_times")
def test_the_form_of_older_versions_is_counted(capsys):
    def largest(form: str) -> float:
        flags = ["--devices", "4", "--stash", form, "--batch", "1"]
        assert main(["plan", "--layers", "4", "--width", "128", "--heads", "2", "--context", "4", *flags]) == 0
        row = next(line for line in capsys.readouterr().out.splitlines() if " async " in line)
        return float(row.split("│")[-3].split()[0])

    assert largest("8bit-differences") < largest("bfloat16") < largest("full")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("versions", [1, 2, 3, 8])
def test_the_ring_is_counted_as_it_is(form, dtype, versions):
    module = nn.Linear(64, 64, dtype=dtype, bias=False)
    stash = WeightStash(module, versions, old_versions=form)
    cost = StageCost(0.0, 0.0, weight_bytes=module.weight.nbytes)
    found = memory_per_stage(
        "async", [cost], old_versions=form, itemsize=dtype.itemsize, state=0.0, delays=[versions - 1]
    )
    assert found == [stash.nbytes + 2 * module.weight.nbytes]  # with the newest version and the gradient


def test_the_methods_own_microbatches_per_update(capsys):
    def delays_and_title(method: str) -> tuple[list[str], str]:
        assert main(["plan", *SMALL, "--devices", "4", "--method", method]) == 0
        printed = capsys.readouterr().out
        rows = [line for line in printed.splitlines() if any(f" {s} " in line for s in ("async", "gpipe", "1f1b"))]
        return [line.split("│")[-2].strip() for line in rows if "│" in line], " ".join(printed.split())

    delays, title = delays_and_title("nesterov:microbatches_per_update=2")
    assert delays == ["1", "0", "0"]
    assert "gpipe and 1f1b update every 4 microbatches" in title
    assert delays_and_title("pipedream-2bw")[0] == ["1", "0", "0"]
    delays, title = delays_and_title("gpipe:microbatches_per_update=8")
    assert delays == ["3", "0", "0"]
    assert "gpipe and 1f1b update every 8 microbatches" in title


def test_slack_is_recommended_on_slow_links(capsys):
    def rows(*given: str) -> list[list[str]]:
        assert main(["plan", *SMALL, "--devices", "4", *given]) == 0
        lines = capsys.readouterr().out.splitlines()
        return [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if " async" in line and "│" in line]

    bare, slack = rows("--latency", "100")
    assert (bare[1], slack[1][:14]) == ("async", "async --slack ")
    n = int(slack[1].split()[-1])
    assert (bare[-1], slack[-1]) == ("3", str(3 + n))
    assert float(slack[4]) < float(bare[4]) / 3
    assert len(rows()) == 1
    (own,) = rows("--latency", "100", "--slack", "6")
    assert (own[1], own[-1]) == ("async --slack 6", "9")
    assert rows("--latency", "100", "--method", "nesterov:slack=6")[0][-1] == "9"
    assert [row[1] for row in rows("--latency", "100", "--method", "pipedream-2bw")] == ["async"]


def test_a_wire_of_fewer_bits_is_faster_on_thin_links(capsys):
    def milliseconds(*given: str) -> float:
        assert main(["plan", *SMALL, "--devices", "2", "--bandwidth", "0.0001", *given]) == 0
        row = next(line for line in capsys.readouterr().out.splitlines() if "│ async " in line)
        return float(row.split("│")[4])

    whole = milliseconds()
    assert milliseconds("--wire", "bfloat16") == pytest.approx(whole / 2, rel=0.1)
    assert milliseconds("--wire", "int8") == pytest.approx(whole * 9 / 32, rel=0.1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--devices", "5"], "4 layers cannot be cut into 5 stages; give more --layers"),
        (["--devices", "2,x"], "needs a whole number of at least 1, not 'x'"),
        (["--devices", "2", "--method", "muon"], "unknown method 'muon'; choose one of"),
        (["--devices", "2", "--method", "basis-rotation"], "plan cannot count basis-rotation, whose step"),
        (
            ["--devices", "2", "--method", "gpipe", "--slack", "1"],
            "method 'gpipe' waits for its gradients, so it has no slack; omit it",
        ),
        (["--wire", "int4"], 'wire must be "bfloat16", "int8" or None, not \'int4\''),
        (["--latency", "-1"], "needs a number of at least 0, not '-1'"),
        (["--bandwidth", "0"], "needs a number above 0, not '0'"),
        (["--speed", "nan"], "needs a number, not 'nan'"),
    ],
)
def test_bad_input_is_one_sentence(given, message, capsys):
    try:
        status = main(["plan", *SMALL, *given])
    except SystemExit as stopped:
        status = stopped.code
    assert status == 2
    assert message in capsys.readouterr().err


def test_measured_bytes_are_those_of_the_layers():
    layers = [nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)]
    inputs = torch.randn(5, 8)
    costs = measure_layers(layers, inputs, lambda output: output.square().mean(), repeats=1)
    assert [c.weight_bytes for c in costs] == [4 * (8 * 16 + 16), 0, 4 * (16 * 4 + 4)]
    assert [c.message_bytes for c in costs] == [4 * 5 * 16, 4 * 5 * 16, 0]
    assert costs[0].activation_bytes == inputs.numel() * 4
    assert all(c.forward > 0 and c.backward > 0 for c in costs)
    assert costs[1].step < costs[0].step
