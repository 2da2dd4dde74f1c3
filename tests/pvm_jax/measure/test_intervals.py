import numpy as np

from pvm_jax.measure.intervals import (
    PositionBucket,
    by_length,
    by_position,
    doubling_buckets,
    estimate,
)


def test_bootstrap_resamples_conversations():
    values = np.zeros((40, 10))
    values[:20] = 1
    mean, low, high = estimate(values)
    assert mean == 0.5
    assert 0.3 < low < 0.4 < 0.6 < high < 0.7  # 400 independent values would give 0.45 to 0.55


def test_the_mean_is_over_what_counts():
    values = np.array([[1, 1, 1, np.nan], [0, np.nan, np.nan, np.nan], [np.nan] * 4])
    assert estimate(values).mean == 0.75
    assert np.isnan(estimate(values[2:])).all()
    alone = estimate(values[:1])
    assert alone.mean == 1
    assert np.isnan(alone.low)


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    rng, covered = np.random.default_rng(0), 0
    for _ in range(200):
        _, low, high = estimate(rng.normal(size=(30, 1)) + rng.normal(size=(30, 5)), resamples=400)
        covered += low <= 0 <= high
    assert 0.88 < covered / 200 < 0.98


def test_buckets_hold_every_position_once():
    for longest in (1, 8, 9, 100, 129):
        buckets = doubling_buckets(longest)
        held = [token for bucket in buckets for token in range(bucket.first, bucket.last + 1)]
        assert held == list(range(1, longest + 1))
    assert doubling_buckets(145)[-2:] == [PositionBucket(33, 64), PositionBucket(65, 145)]
    values = np.arange(1.0, 13)[None]
    assert [e.mean for e in by_position(values, doubling_buckets(12))] == [4.5, 10.5]
    lengths = np.array([3, 9, 12])
    got = by_length(
        np.array([[1.0], [0.0], [1.0]]),
        lengths,
        [PositionBucket(1, 8), PositionBucket(9, 16), PositionBucket(17, 32)],
    )
    assert [e.mean for e in got[:2]] == [1, 0.5]
    assert np.isnan(got[2].mean)
