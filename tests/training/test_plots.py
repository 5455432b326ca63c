"""The plots: where their lines are drawn."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import tolerances
import torch
from matplotlib.figure import Figure

from nesterov_pp.training import plots
from nesterov_pp.training.metrics import Curves


def drawn(monkeypatch: pytest.MonkeyPatch, draw: Any) -> list[Any]:
    """Return the lines of the figure that ``draw`` writes to a file."""
    figures: list[Figure] = []
    save = Figure.savefig

    def keep(self: Figure, *arguments: Any, **options: Any) -> None:
        figures.append(self)
        save(self, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    file = io.BytesIO()
    draw(file)
    assert file.getvalue().startswith(b"\x89PNG")
    return list(figures[0].axes[0].get_lines())


@pytest.mark.parametrize("count", [1, 99, 100, 250])
def test_the_running_mean_of_a_straight_line_lies_on_it(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    train = [5.0 - m / count for m in range(1, count + 1)]
    curves = Curves(train, [(count, 4.0)])
    _, mean, _ = drawn(monkeypatch, lambda file: plots.draw_run(file, curves, "nesterov"))
    where, values = mean.get_data()
    np.testing.assert_allclose(values, 5.0 - np.asarray(where) / count, **tolerances.MANY_STEPS[torch.float64])


def test_the_mean_cosine_of_uneven_steps_is_drawn_in_the_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    where = np.cumsum(np.arange(1, 41))
    points = [(int(m), float(m) / 1000.0) for m in where]
    _, mean = drawn(monkeypatch, lambda file: plots.draw_alignment(file, {1: points}, [3]))
    places, values = mean.get_data()
    np.testing.assert_allclose(values, np.asarray(places) / 1000.0, **tolerances.MANY_STEPS[torch.float64])
