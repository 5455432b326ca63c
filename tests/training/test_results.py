"""Results that a comparison computes from curves, checked by hand."""

from __future__ import annotations

import pytest

from nesterov_pp.training import results
from nesterov_pp.training.metrics import Curves


def row(method: str, loss: float, lr: float = 1e-3) -> dict:
    return {"method": method, "lr": lr, "validation_loss": loss, "validation_losses": [loss]}


def test_slowdown_and_recovered_share():
    curves = {
        "gpipe-1": [(100, 4.0), (200, 3.0), (300, 2.0)],
        "pipedream": [(100, 4.5), (200, 4.0), (300, 3.5)],
        "good": [(100, 3.5), (200, 2.5), (300, 1.5)],
        "half": [(100, 4.0), (200, 3.5), (300, 2.75)],
    }
    rows = results.relate([row(m, c[-1][1]) for m, c in curves.items()], curves)
    related = {r["method"]: (r["slowdown"], r["recovered"]) for r in rows}
    assert related["gpipe-1"] == (1.0, 1.0)
    # gpipe-1 reaches 3.5 halfway between 100 and 200.
    assert related["pipedream"] == (pytest.approx(300 / 150), 0.0)
    assert related["good"] == (pytest.approx(250 / 300), pytest.approx(2.0 / 1.5))
    assert related["half"] == (pytest.approx(300 / 225), pytest.approx(0.5))


def test_nothing_is_related_to_methods_that_are_not_there():
    curves = {"nesterov": [(1, 2.0)]}
    (alone,) = results.relate([row("nesterov", 2.0)], curves)
    assert (alone["slowdown"], alone["recovered"]) == (None, None)


def test_the_best_rate_of_each_method():
    rows = [row("a", 2.0, 0.1), row("b", 1.0, 0.1), row("a", 1.5, 0.2), row("b", 3.0, 0.2)]
    rows[0]["validation_losses"], rows[0]["validation_loss"] = [2.0, 1.0], 1.5  # only the first seed chooses
    best = results.best_rates(rows)
    assert [(r["method"], r["lr"]) for r in best] == [("a", 0.2), ("b", 0.1)]
    assert best[0]["by_lr"] == {"0.1": 2.0, "0.2": 1.5}


def test_mean_curve():
    curves = [Curves([], [(10, 1.0), (20, 3.0)]), Curves([], [(10, 2.0), (20, 5.0)])]
    assert results.mean_curve(curves) == [(10, 1.5), (20, 4.0)]


def test_a_table_by_depth_names_what_failed():
    table = results.depth_markdown({2: [row("a", 1.0), row("b", 2.0)], 4: [row("a", 1.5)]})
    assert table.splitlines()[2:] == ["| a | 1.0000 | 1.5000 |", "| b | 2.0000 | failed |"]
