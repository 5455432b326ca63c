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
    assert (alone["slowdown"], alone["recovered"], alone["ahead"]) == (None, None, None)


def test_methods_are_related_within_one_family_of_rules():
    losses = {
        "gpipe-1": 2.0,
        "gpipe": 2.2,
        "pipedream": 3.0,
        "nesterov": 2.5,
        "gpipe-nadam": 2.1,
        "gpipe-1-rotated": 1.0,
        "gpipe-1-rotated-nadam": 1.1,
        "gpipe-rotated": 1.4,
        "pipedream-rotated": 2.0,
        "nesterov-rotated": 1.2,
        "nesterov-sgd": 4.0,
    }
    curves = {m: [(100, 5.0), (200, loss)] for m, loss in losses.items()}
    related = {r["method"]: r for r in results.relate([row(m, loss) for m, loss in losses.items()], curves)}
    assert related["nesterov"]["recovered"] == pytest.approx(0.5)
    assert related["nesterov"]["ahead"] == pytest.approx(2.1 - 2.5)
    assert related["nesterov-rotated"]["recovered"] == pytest.approx(0.8)
    assert related["nesterov-rotated"]["ahead"] == pytest.approx(1.4 - 1.2)
    assert related["nesterov-rotated"]["rule"] == "rotated"
    assert {related["nesterov-sgd"][n] for n in ("slowdown", "recovered", "ahead")} == {None}


def test_methods_with_hyper_parameters_are_related_like_their_names():
    losses = {"gpipe-1:eps=1e-6": 2.0, "gpipe:eps=1e-6": 2.2, "pipedream:eps=1e-6": 3.0, "pipedream:eps=1e-4": 3.5}
    curves = {m: [(100, 5.0), (200, loss)] for m, loss in (losses | {"nesterov:beta1=0.9": 2.5}).items()}
    *_, ours = results.relate([row(m, points[-1][1]) for m, points in curves.items()], curves)
    assert (ours["recovered"], ours["ahead"], ours["rule"]) == (pytest.approx(0.5), pytest.approx(-0.3), "adam")


def test_a_best_rate_at_the_edge_of_the_grid_is_named():
    rows = [
        {"method": m, "lr": lr, "by_lr": {"0.1": 1.0, "0.2": 1.0, "0.4": 1.0}}
        for m, lr in (("a", 0.1), ("b", 0.2), ("c", 0.4))
    ]
    small, large = results.edges(rows)
    assert small == "The best learning rate of a, 0.1, lies at the edge of those tried; a smaller one may be better."
    assert large.endswith("of c, 0.4, lies at the edge of those tried; a larger one may be better.")
    assert results.edges([{"method": "a", "lr": 0.1}, {"method": "b", "lr": 0.1, "by_lr": {"0.1": 1.0}}]) == []


def test_the_best_rate_of_each_method():
    rows = [row("a", 2.0, 0.1), row("b", 1.0, 0.1), row("a", 1.5, 0.2), row("b", 3.0, 0.2)]
    rows[0]["validation_losses"], rows[0]["validation_loss"] = [2.0, 1.0], 1.5  # only the first seed chooses
    best = results.best_rates(rows)
    assert [(r["method"], r["lr"]) for r in best] == [("a", 0.2), ("b", 0.1)]
    assert best[0]["by_lr"] == {"0.1": 2.0, "0.2": 1.5}


def test_the_best_rate_over_all_seeds():
    def of_seeds(lr: float, *losses: float) -> dict:
        return {**row("a", sum(losses) / len(losses), lr), "validation_losses": list(losses)}

    rows = [of_seeds(0.1, 2.0, 3.0), of_seeds(0.2, 2.25, 2.25), of_seeds(0.4, 1.0)]  # a seed failed at 0.4
    (best,) = results.best_rates(rows, every_seed=True)
    assert best["lr"] == 0.2
    assert best["by_lr"] == {"0.1": 2.5, "0.2": 2.25, "0.4": 1.0}
    assert best["losses_by_lr"] == {"0.1": [2.0, 3.0], "0.2": [2.25, 2.25], "0.4": [1.0]}


def test_mean_curve():
    curves = [Curves([], [(10, 1.0), (20, 3.0)]), Curves([], [(10, 2.0), (20, 5.0)])]
    assert results.mean_curve(curves) == [(10, 1.5), (20, 4.0)]


def test_a_table_by_depth_names_what_failed():
    table = results.depth_markdown({2: [row("a", 1.0), row("b", 2.0)], 4: [row("a", 1.5)]})
    assert table.splitlines()[2:] == ["| a | 1.0000 | 1.5000 |", "| b | 2.0000 | failed |"]


def test_the_tokens_of_each_depth_to_the_loss_that_all_reach():
    curves = {
        1: {"a": [(100, 4.0), (200, 2.0)], "b": [(100, 3.0), (200, 2.5)]},
        2: {"a": [(100, 4.0), (200, 3.0)]},
        4: {"a": [(100, 4.5), (200, 3.5)], "b": [(100, 3.5), (200, 2.0)]},
    }
    by_depth = {n: [row(m, points[-1][1]) for m, points in of.items()] for n, of in curves.items()}
    related = results.relate_depths(by_depth, curves)
    # "a" reaches 3.5, its loss with 4 stages, after 125 microbatches with one stage and 150 with two.
    a = [next(r for r in rows if r["method"] == "a") for rows in related.values()]
    assert [r["relative_tokens"] for r in a] == pytest.approx([1.0, 150 / 125, 200 / 125])
    assert {r["reached"] for r in a} == {3.5}
    assert results.depth_markdown(related).splitlines()[2:] == [
        "| a | 2.0000 | 3.0000 | 3.5000 |",
        "| a, tokens to 3.500 | 1.00x | 1.20x | 1.60x |",
        "| b | 2.5000 | failed | 2.0000 |",
        "| b, tokens to 2.500 | 1.00x | failed | 0.83x |",
    ]
