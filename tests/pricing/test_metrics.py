"""What is reported, with hand-computed expectations."""

import math
import time

import numpy as np
import pytest

from pricing.evaluation.metrics import band_of, bootstrap_interval, colour, error_apart, paired_difference, score
from pricing.evaluation.stated import states_price


@pytest.mark.parametrize(
    "truth, guess, expected",
    [
        (100, 139, "green"),
        (100, 140, "yellow"),
        (500, 401, "green"),
        (500, 400, "yellow"),
        (100, 179, "yellow"),
        (100, 180, "red"),
        (500, 300, "red"),
    ],
)
def test_colours(truth, guess, expected):
    assert colour(truth, guess) == expected


def test_score_by_hand():
    truth, guess = np.array([10.0, 100.0, 400.0]), np.array([20.0, 150.0, 300.0])
    interval = np.array([5.0, 110.0, 300.0]), np.array([10.0, 150.0, 500.0])  # hold two
    m = score(truth, guess, constant=110.0, categories=["a", "", "a"], parse_failures=2, interval=interval)
    assert m["n"] == 3 and m["parse_failures"] == 2
    assert m["mae"] == pytest.approx(160 / 3)
    assert m["median_error"] == 50
    assert m["bias"] == pytest.approx((10 + 50 - 100) / 3)
    assert m["coverage"] == pytest.approx(2 / 3) and m["width"] == pytest.approx((5 + 40 + 200) / 3)
    assert m["constant_mae"] == pytest.approx((100 + 10 + 290) / 3)
    assert m["ratio"] == pytest.approx(160 / 400)
    logs = [math.log(11) - math.log(21), math.log(101) - math.log(151), math.log(401) - math.log(301)]
    assert m["rmsle"] == pytest.approx(math.sqrt(sum(x * x for x in logs) / 3))
    assert m["r2"] == pytest.approx(1 - 12600 / ((160**2) + 70**2 + 230**2))
    assert (m["green"], m["yellow"], m["red"]) == (1, 2, 0) and m["hits"] == pytest.approx(1 / 3)
    assert m["bands"] == {
        "$0-50": {"n": 1, "mae": 10, "bias": 10, "coverage": 1, "width": 5},
        "$100-200": {"n": 1, "mae": 50, "bias": 50, "coverage": 0, "width": 40},
        "$400-1000": {"n": 1, "mae": 100, "bias": -100, "coverage": 1, "width": 200},
    }
    assert m["categories"] == {
        "(none)": {"n": 1, "mae": 50, "bias": 50, "coverage": 0, "width": 40},
        "a": {"n": 2, "mae": 55, "bias": -45, "coverage": 1, "width": 102.5},
    }
    low, high = m["mae_ci95"]
    assert 10 <= low < m["mae"] < high <= 100


def test_interval_is_seeded_and_near_the_normal_one():
    values = np.random.default_rng(1).normal(50, 20, 2000)
    low, high = bootstrap_interval(values)
    assert [low, high] == bootstrap_interval(values)
    half = 1.96 * values.std() / math.sqrt(2000)
    np.testing.assert_allclose([low, high], [values.mean() - half, values.mean() + half], atol=0.12)


def test_without_ranges_nothing_is_said_about_them():
    m = score(np.array([500.0, 10.0]), np.array([500.0, 12.0]), 10.0, ["b", "a"])
    assert "coverage" not in m and m["bands"]["$0-50"] == {"n": 1, "mae": 2, "bias": 2}
    assert list(m["bands"]) == ["$0-50", "$400-1000"] and list(m["categories"]) == ["a", "b"]


def test_paired_difference_by_hand():
    """The differences are 1 and 3: resampled means are 1, 2, 2 or 3, each as often, so the middle 95 % is all of it."""
    paired = paired_difference(np.array([11.0, 53.0]), np.array([10.0, 50.0]))
    assert paired == {"difference": 2.0, "ci95": [1.0, 3.0]}
    paired = paired_difference(np.array([10.0, 50.0]), np.array([11.0, 53.0]))
    assert paired == {"difference": -2.0, "ci95": [-3.0, -1.0]}


def test_what_is_hard_for_both_does_not_hide_a_difference():
    """Errors that share a spread of $80 and differ by $2: their intervals are over $6 wide, the difference's is not."""
    rng = np.random.default_rng(0)
    shared = rng.exponential(80, 2000)
    a, b = shared + 2 + rng.normal(0, 5, 2000), shared + rng.normal(0, 5, 2000)
    low, high = paired_difference(a, b, seed=1)["ci95"]
    half = 1.96 * (a - b).std() / math.sqrt(2000)
    np.testing.assert_allclose([low, high], [(a - b).mean() - half, (a - b).mean() + half], atol=0.03)
    assert bootstrap_interval(a)[1] - bootstrap_interval(a)[0] > 6
    assert paired_difference(a, b, seed=1) == paired_difference(a, b, seed=1) != paired_difference(a, b, seed=2)


def test_groups_are_drawn_whole():
    """100 products of which each stands there 9 times: their interval is that of the 100, not of the 900."""
    values = np.random.default_rng(1).normal(50, 20, 100)
    titles = [f"product {n}" for n in range(100)] * 9
    assert bootstrap_interval(np.tile(values, 9), titles) == pytest.approx(bootstrap_interval(values), abs=1)
    low, high = bootstrap_interval(np.tile(values, 9))
    half = 1.96 * values.std() / 10
    np.testing.assert_allclose([low, high], [values.mean() - half / 3, values.mean() + half / 3], atol=0.3)
    # Of unequal groups: 1 item off by 0 and 3 off by 4, so that a draw's mean is 0, 3 (one of each) or 4.
    errors, zeros = np.array([0.0, 4.0, 4.0, 4.0]), np.zeros(4)
    assert paired_difference(errors, zeros, ["a", "b", "b", "b"]) == {"difference": 3.0, "ci95": [0.0, 4.0]}
    assert score(errors + 1, zeros + 1, 1.0, [""] * 4, groups=["a", "b", "b", "b"])["mae_ci95"] == [0.0, 4.0]


@pytest.mark.parametrize("a, b", [([], []), ([1.0], [1.0, 2.0]), ([1.0, 2.0], [1.0])])
def test_errors_of_different_items_are_not_compared(a, b):
    with pytest.raises(ValueError, match=f"errors of {len(a)} items with those of {len(b)}"):
        paired_difference(np.array(a), np.array(b))


def test_bands_at_their_borders():
    assert [band_of(p) for p in (0.5, 49.99, 50, 399.99, 400, 999.49)] == [
        "$0-50",
        "$0-50",
        "$50-100",
        "$200-400",
        "$400-1000",
        "$400-1000",
    ]


def test_scores_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="cannot score"):
        score(np.array([]), np.array([]), 1.0, [])
    with pytest.raises(ValueError, match="guess 2 is not a number"):
        score(np.array([1.0, 2.0]), np.array([1.0, np.nan]), 1.0, ["", ""])


def test_smape_by_hand():
    """2 * 10 / 190 and 2 * 30 / 30: a guess of nothing is as wrong as can be"""
    metrics = score(np.array([100.0, 30.0]), np.array([90.0, 0.0]), 50.0, ["c"] * 2)
    assert metrics["smape"] == pytest.approx((20 / 190 + 2) / 2)


def test_the_error_of_some_items_and_of_the_others():
    errors = np.array([1.0, 2.0, 6.0])
    assert error_apart(errors, [2]) == {"share": 1 / 3, "mae_with": 6.0, "mae_without": 1.5}
    assert error_apart(errors, []) == {"share": 0.0, "mae_with": None, "mae_without": 3.0}
    assert error_apart(errors, [0, 1, 2])["mae_without"] is None


@pytest.mark.parametrize(
    "text, price, named",
    [
        ("Mug. Now only $12.99!", 12.99, True), ("Mug\nPrice: 12.99", 12.99, True), ("12.99 a piece", 12.99, True),
        ("sold at $ 13", 12.99, True), ("13 USD", 13.2, True), ("only 13 left", 13, True),
        ("Price is US $13.", 13, True),
        ("pack of 13", 13, False), ("112.99 mm, 12.990, 12.99.1", 12.99, False), ("was $12.98", 12.99, False),
        ("$1,013 and $13,000", 13, False), ("$130", 13, False), ("", 13, False), ("13 dollars", 13, True),
    ],
)  # fmt: skip
def test_prices_that_stand_in_the_text(text, price, named):
    assert states_price(text, price) == named


def test_looking_for_a_price_takes_no_time():
    started = time.perf_counter()
    for piece in ("1,", "1", ",111", "$ ", " ", "price "):
        assert not states_price(piece * (1_000_000 // len(piece)), 13)
    assert time.perf_counter() - started < 4
