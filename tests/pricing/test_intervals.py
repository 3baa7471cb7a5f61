"""Conformal ranges: the definition by hand, and the promised coverage where the model is badly calibrated."""

import math

import numpy as np
import pytest

from pricing.distribution.intervals import (
    LEVELS,
    MIDDLE,
    calibrated_range,
    central_range,
    conformal_offset,
    cross_calibrated_range,
    log_quantiles,
    widen,
)


def test_the_middle_of_a_distribution_by_hand():
    p = np.zeros((3, 1000))
    p[0, [10, 20, 30, 40]] = [0.1, 0.4, 0.4, 0.1]
    p[1, 0] = 1.0
    p[2, 100:200] = 0.01
    quantile = dict(zip(LEVELS, np.exp(log_quantiles(p)).T, strict=True))
    # A whole dollar is a dollar wide: 10 holds the first tenth, half of it up to 10.00, a quarter up to 9.75.
    np.testing.assert_allclose([quantile[0.025][0], quantile[0.05][0], quantile[0.3][0]], [9.75, 10, 20], atol=1e-6)
    np.testing.assert_allclose([quantile[q][1] for q in LEVELS], 0.5)  # nothing costs less
    np.testing.assert_allclose([quantile[0.05][2], quantile[0.5][2]], [104.5, 149.5], atol=1e-6)
    low, high = central_range(log_quantiles(p), 0.8)
    np.testing.assert_allclose(low[[0, 2]], [10.5, 109.5], atol=1e-6)
    np.testing.assert_allclose(high[[0, 2]], [30.5, 189.5], atol=1e-6)
    low, high = central_range(log_quantiles(p), 0.95)
    np.testing.assert_allclose([low[2], high[2]], [102, 197], atol=1e-6)
    with pytest.raises(ValueError, match="at most 95 %"):
        central_range(log_quantiles(p), 0.96)


def test_the_median_has_the_least_expected_absolute_error():
    p = np.random.default_rng(0).dirichlet(np.full(1000, 0.01), size=5)
    for row, median in zip(p, np.exp(log_quantiles(p)[:, MIDDLE]), strict=True):
        expected = [(row * np.abs(np.arange(1000) - guess)).sum() for guess in range(1000)]
        assert abs(median - int(np.argmin(expected))) <= 0.5


def test_offset_by_hand():
    """Four prices in a range of 50 to 200: inside by a factor of 2, 1.25 and 1, and outside by 3."""
    truth = np.array([100.0, 160.0, 50.0, 600.0])
    low, high = np.full(4, 50.0), np.full(4, 200.0)
    scores = [math.log(0.5), math.log(0.8), math.log(1.0), math.log(3.0)]
    for share, rank in ((0.2, 1), (0.4, 2), (0.5, 2.5), (0.6, 3), (0.65, 3.25), (0.8, 4)):  # 5 share
        one, other = scores[math.ceil(rank) - 2], scores[math.ceil(rank) - 1]
        expected = other if rank == 1 else one + (rank - math.ceil(rank) + 1) * (other - one)
        assert conformal_offset(low, high, truth, share) == pytest.approx(expected), share
    with pytest.raises(ValueError, match="4 validation items are too few .* contains 81%.*: 5 are needed"):
        conformal_offset(low, high, truth, 0.81)
    assert conformal_offset(np.ones(99), np.arange(1.0, 100), np.full(99, 50.0), 0.07) == pytest.approx(
        math.log(50 / 93)  # the 7th of the scores log(50 / high), not the 8th: (99 + 1) 0.07 is 7
    )


def test_ends_move_by_a_factor_and_never_cross():
    middle = np.array([45.0, 40.0])
    low, high = widen(np.array([40.0, 2.0]), middle, np.array([90.0, 800.0]), math.log(2))
    np.testing.assert_allclose(low, [20, 1])
    np.testing.assert_allclose(high, [180, 999.49])
    low, high = widen(np.array([40.0, 2.0]), middle, np.array([90.0, 800.0]), -math.log(2))
    np.testing.assert_allclose([low, high], [[45, 4], [45, 400]])  # no further than the guess


def draw(rng, shape, centre_bias, width):
    """(low, high, truth): prices with log-sd 0.6 about a known centre, ranges about a biased one with log-sd 0.6
    width."""
    centre = rng.normal(4.0, 0.7, shape)
    truth = np.exp(centre + rng.normal(0, 0.6, shape))
    reach = 1.2816 * 0.6 * width  # the 90th percentile of a normal distribution
    return np.exp(centre + centre_bias - reach), np.exp(centre + centre_bias + reach), truth


@pytest.mark.parametrize("centre_bias, width", [(0.0, 1.0), (0.0, 0.2), (0.0, 4.0), (0.8, 0.5), (-0.5, 2.0)])
@pytest.mark.parametrize("n", [10, 57])
def test_coverage_is_what_was_asked_for(centre_bias, width, n):
    """The mean of 4,000 calibrations of 20 new items each; its standard error is below 0.003."""
    rng, inside = np.random.default_rng(n), []
    for _ in range(4000):
        offset = conformal_offset(*draw(rng, n, centre_bias, width), 0.8)
        low, high, truth = draw(rng, 20, centre_bias, width)
        inside.append(((truth >= low * math.exp(-offset)) & (truth <= high * math.exp(offset))).mean())
    assert np.mean(inside) == pytest.approx(0.8, abs=0.01)


NORMAL = np.array([-1.96, *[-1.645, -1.282, -1.036, -0.842, -0.674, -0.524, -0.385, -0.253, -0.126], 0])
NORMAL = np.concatenate([NORMAL, -NORMAL[-2::-1]])  # at LEVELS


@pytest.mark.parametrize(
    "bias, width, skew", [(0, 1, 0), (0.8, 0.5, 0), (0, 4, 0), (0.5, 3, -0.8), (-0.5, 3, 0.8), (1.5, 1, 0)]
)
@pytest.mark.parametrize("n", [20, 22, 23, 28, 41])
def test_the_mean_coverage_of_many_small_splits_is_what_is_promised(n, bias, width, skew):
    """78 to 82 % of ranges of 80 %, the whole way from quantiles to dollars; prices end in .99 and have heavy tails. By
    the rank rounded up it would be 83.3 % after 23 items; by the nearer end of ranges that are wide and far to one side
    of the guess, 90 %."""
    rng, inside = np.random.default_rng(n), []
    spread = 0.4 * width * np.where(NORMAL > 0, NORMAL * (1 + skew), NORMAL * (1 - skew))
    for _ in range(500):
        centre = rng.normal(4, 0.7, n + 40)
        truth = np.clip(np.round(np.exp(centre + 0.4 * rng.standard_t(4, n + 40))) - 0.01, 0.5, 999.49)
        quantiles = centre[:, None] + bias + spread
        guess = np.exp(quantiles[n:, MIDDLE])
        low, high, calibrated = calibrated_range(quantiles[n:], guess, 0.8, quantiles[:n], truth[:n])
        inside.append((calibrated and (low <= truth[n:]) & (truth[n:] <= high)).mean())
    assert 0.78 <= np.mean(inside) <= 0.82


@pytest.mark.parametrize("sharpness", [0.3, 1.0, 3.0])
def test_coverage_of_ranges_of_a_distribution_over_dollars(sharpness):
    """The whole way, from P (items, 1000) that is `sharpness` times too narrow to ranges; one calibration on 2,000."""
    rng, dollars = np.random.default_rng(0), np.arange(1000)
    centre = np.exp(rng.uniform(2.5, 5.5, 4000))
    truth = np.clip(centre * np.exp(rng.normal(0, 0.3, 4000)), 0.5, 999.49)
    p = np.exp(-0.5 * (np.log((dollars + 0.25) / centre[:, None]) * sharpness / 0.3) ** 2) / (dollars + 0.25)
    low, high = central_range(log_quantiles(p / p.sum(1, keepdims=True)), 0.8)
    before = ((truth >= low) & (truth <= high))[2000:].mean()
    low, high = widen(low, centre, high, conformal_offset(low[:2000], high[:2000], truth[:2000], 0.8))
    after = ((truth >= low) & (truth <= high))[2000:].mean()
    assert 0.77 < after < 0.83, after
    if sharpness != 1.0:
        assert abs(before - 0.8) > 0.1, before


def test_ranges_that_make_no_sense_are_refused():
    ones = np.ones(5)
    with pytest.raises(ValueError, match="cannot calibrate 5 to 5 ranges on 4 prices"):
        conformal_offset(ones, ones, ones[:4], 0.8)
    with pytest.raises(ValueError, match="share of 80"):
        conformal_offset(ones, ones, ones, 80)
    for bad in (0.0, -3.0, np.nan):
        with pytest.raises(ValueError, match="positive prices in dollars"):
            conformal_offset(np.array([1, 1, bad, 1, 1]), ones, ones, 0.8)
    with pytest.raises(ValueError, match="at least one"):
        conformal_offset(ones[:0], ones[:0], ones[:0], 0.8)


def test_ranges_are_moved_by_what_the_calibration_set_asks_for():
    rng = np.random.default_rng(0)
    quantiles = log_quantiles(rng.dirichlet(np.ones(1000), 12))
    truth = rng.uniform(1, 900, 12)
    low, high, calibrated = calibrated_range(quantiles[:3], np.exp(quantiles[:3, MIDDLE]), 0.9, quantiles, truth)
    offset = conformal_offset(*central_range(quantiles, 0.9), truth, 0.9, np.exp(quantiles[:, MIDDLE]))
    assert calibrated and abs(offset) > 0.01
    low_end, high_end = central_range(quantiles[:3], 0.9)
    expected = widen(low_end, np.exp(quantiles[:3, MIDDLE]), high_end, offset)
    np.testing.assert_array_equal([low, high], expected)
    guess = np.array([low[0] / 2, (high[1] + 999) / 2, high[2]])  # as the mode's may be: its range holds it
    around = calibrated_range(quantiles[:3], guess, 0.9, quantiles, truth)
    np.testing.assert_array_equal(around[:2], [[guess[0], low[1], low[2]], [high[0], guess[1], high[2]]])
    low, high, calibrated = calibrated_range(quantiles[:3], guess, 0.95, quantiles, truth)
    low_end, high_end = central_range(quantiles[:3], 0.95)  # would need 19 items
    assert not calibrated
    np.testing.assert_array_equal([low, high], [np.minimum(low_end, guess), np.maximum(high_end, guess)])
    assert not calibrated_range(quantiles, np.full(12, 9.0), 0.8, quantiles[:0], truth[:0])[2]


def test_validation_items_are_calibrated_by_their_other_half():
    """Ranges that are a factor of 3 too narrow, holding 80 % afterwards; by themselves it would be 80 % exactly."""
    rng = np.random.default_rng(0)
    centre, spread = rng.normal(4, 0.7, 400), 0.3 * np.array([-1.96, *np.linspace(-1.64, 1.64, 19), 1.96])
    quantiles, truth = centre[:, None] + spread / 3, np.exp(centre + 0.3 * rng.normal(size=400))
    guess = np.exp(centre)
    low, high, calibrated = cross_calibrated_range(quantiles, guess, 0.8, truth)
    own = conformal_offset(*central_range(quantiles, 0.8), truth, 0.8)
    assert calibrated and 0.74 < np.mean((low <= truth) & (truth <= high)) < 0.86
    by_odd = calibrated_range(quantiles[::2], guess[::2], 0.8, quantiles[1::2], truth[1::2])
    np.testing.assert_array_equal(low[::2], by_odd[0])
    assert not np.allclose(low, central_range(quantiles, 0.8)[0] * math.exp(-own))
    assert not cross_calibrated_range(quantiles[:6], guess[:6], 0.8, truth[:6])[2]
