"""The arithmetic of the schedule: delays, versions and balanced partitions."""

from __future__ import annotations

import pytest

from nesterov_pp.pipeline import balanced_sizes, stage_delays, version_for_update
from nesterov_pp.pipeline.delay_models import forwards_ahead


@pytest.mark.parametrize(
    ("stages", "k", "delays"),
    [
        (8, 1, [7, 6, 5, 4, 3, 2, 1, 0]),
        (8, 4, [1, 1, 1, 1, 0, 0, 0, 0]),
        (1, 1, [0]),
        (4, 2, [1, 1, 0, 0]),
    ],
)
def test_delays_by_the_formula(stages, k, delays):
    assert stage_delays(stages, k) == delays


@pytest.mark.parametrize("stages", [2, 4, 8, 16])
def test_delays_are_those_of_a_replayed_pipeline(stages):
    """Replay a symbolic 1F1B run without any formula: P - i warm-up forwards, then forward and backward in turn."""
    for i in range(1, stages + 1):
        version, forwarded, seen = 0, [], []
        forwarded = [version] * (stages - i)
        for _ in range(40):
            forwarded.append(version)
            seen.append(forwarded.pop(0))
            version += 1
        tau = stage_delays(stages)[i - 1]
        assert seen == [version_for_update(t, tau) for t in range(40)]


@pytest.mark.parametrize(
    ("stages", "k", "slack", "delays"),
    [
        (8, 1, 7, [14, 12, 10, 8, 6, 4, 2, 0]),
        (4, 1, 1, [4, 3, 2, 0]),
        (4, 1, 4, [7, 5, 3, 0]),
        (4, 2, 4, [3, 2, 1, 0]),
        (2, 1, 3, [4, 0]),
        (1, 1, 5, [0]),
    ],
)
def test_delays_with_slack(stages, k, slack, delays):
    assert stage_delays(stages, k, slack) == delays
    assert [(2 * ahead + 1) // (2 * k) for ahead in forwards_ahead(stages, slack)] == delays


@pytest.mark.parametrize("bad", [(0, 1), (4, 0)])
def test_bad_counts(bad):
    with pytest.raises(ValueError, match="must be at least 1"):
        stage_delays(*bad)


@pytest.mark.parametrize(
    ("costs", "parts", "sizes"),
    [([1, 1, 1, 1], 2, [2, 2]), ([9, 1, 1, 1], 2, [1, 3]), ([1, 1, 1, 9], 3, [1, 2, 1]), ([0, 0, 5], 3, [1, 1, 1])],
)
def test_balanced_sizes(costs, parts, sizes):
    got = balanced_sizes(costs, parts)
    assert sum(got) == len(costs)
    assert len(got) == parts

    def largest(lengths: list[int]) -> int:
        starts = [sum(lengths[:i]) for i in range(len(lengths))]
        return max(sum(costs[s : s + n]) for s, n in zip(starts, lengths, strict=True))

    assert largest(got) == largest(sizes)
