"""Price ranges that hold the true price as often as they promise.

A model's own middle 80 % is only as good as the model is calibrated, and fine-tuned networks are not. Conformalised
quantile regression (Romano, Patterson and Candes 2019, arXiv 1905.03222) measures on n items that were not trained on
how far the true price lies outside the range [low, high], negative where it lies inside:

    score_i = max(log(low_i / price_i), log(price_i / high_i))

and moves both ends outwards by the ceil((n + 1) share)-th smallest score. Where those items and a new one come in no
particular order (are exchangeable), the new price lies inside with probability at least `share`, and at most
share + 1 / (n + 1) where no two scores are equal, however wrong the model is. That holds on average over all products,
not for each kind of them. Validation items that a run chose its weights by (`--keep best`, a head trained afterwards)
are a little better known than new ones; what that costs in coverage is measured on test items.

The scores are in log price, not in dollars: errors grow with the price, so the ends move by a factor. An offset in
dollars that is right for a $500 graphics card would make the range of a $10 cable useless.
"""

import math

import numpy as np

from pricing.data.items import MAX_PRICE, MIN_PRICE

SHARES = (0.5, 0.8, 0.9, 0.95)  # of the prices that a range is to hold
SHARE = 0.8
LEVELS = (0.025, *(n / 20 for n in range(1, 20)), 0.975)  # of the quantiles that a forecast is kept as
MIDDLE = len(LEVELS) // 2


def in_dollars(log_price: np.ndarray) -> np.ndarray:
    return np.clip(np.exp(log_price), MIN_PRICE, MAX_PRICE)


def log_quantiles(distribution: np.ndarray) -> np.ndarray:
    """Quantiles of the log price at LEVELS of P (n, 1000), each whole dollar d spread evenly from d - 0.5 to d + 0.5.
    -> (n, 21)"""
    edges = np.clip(np.arange(distribution.shape[1] + 1) - 0.5, MIN_PRICE, MAX_PRICE)
    reached = np.concatenate([np.zeros((len(distribution), 1)), np.cumsum(distribution, axis=1)], axis=1)
    # interp wants steps that rise: where nothing lies, any dollar between would do
    found = [np.interp(LEVELS, row + 1e-12 * np.arange(len(row)), edges) for row in reached]
    return np.log(np.array(found).reshape(-1, len(LEVELS)))


def central_range(quantiles: np.ndarray, share: float = SHARE) -> tuple[np.ndarray, np.ndarray]:
    """(low, high) in dollars, each (n,): the middle `share` (0.95 at most) of forecasts (n, 21); between two levels the
    log price is interpolated."""
    if not 0 < share <= LEVELS[-1] - LEVELS[0] + 1e-9:
        raise ValueError(f"forecasts are kept for ranges of at most 95 % of the prices, not {share:.0%}")
    ends = [(1 - share) / 2, (1 + share) / 2]
    low, high = (np.array([np.interp(end, LEVELS, row) for row in quantiles]).reshape(-1) for end in ends)
    return in_dollars(low), in_dollars(high)


def conformal_rank(n: int, share: float) -> int:
    """Which of n scores, from the smallest, 1 first; beyond n where these are too few"""
    return math.ceil(round((n + 1) * share, 9))  # 100 * 0.07 is 7.000000000000001


def conformal_offset(low: np.ndarray, high: np.ndarray, truth: np.ndarray, share: float = SHARE) -> float:
    """How far to move both ends, in log price; negative where the ranges are too wide. All arrays in dollars, (n,).

    Raises ValueError for too few items (`share` / (1 - share) are needed) and for what is no positive price.
    """
    n = len(truth)
    if not 0 < share < 1 or not len(low) == len(high) == n:
        raise ValueError(f"cannot calibrate {len(low)} to {len(high)} ranges on {n} prices for a share of {share}")
    if n == 0 or not (np.minimum(np.minimum(low, high), truth) > 0).all():  # NaN fails this too
        raise ValueError("ranges are calibrated on positive prices in dollars, at least one of them")
    scores = np.maximum(np.log(low / truth), np.log(truth / high))
    if (rank := conformal_rank(n, share)) > n:
        raise ValueError(
            f"{n} validation items are too few to calibrate a range that holds {share:.0%} of the prices: "
            f"{math.ceil(round(share / (1 - share), 9))} are needed"
        )
    return float(np.sort(scores)[rank - 1])


def calibrated_range(
    quantiles: np.ndarray, guess: np.ndarray, share: float, held: np.ndarray, truth: np.ndarray
) -> tuple[np.ndarray, np.ndarray, bool]:
    """(low, high, whether they could be calibrated): the middle `share` of forecasts (n, 21), moved by what forecasts
    `held` (m, 21) of m validation items with prices `truth` ask for; `guess` (n,) dollars lies in it."""
    low, high = central_range(quantiles, share)
    enough = conformal_rank(len(truth), share) <= len(truth)
    offset = conformal_offset(*central_range(held, share), truth, share) if enough else 0.0
    return *widen(low, guess, high, offset), enough


def cross_calibrated_range(quantiles: np.ndarray, guess: np.ndarray, share: float, truth: np.ndarray) -> tuple:
    """As calibrated_range, for the validation items themselves: the even rows by the odd ones, and the other way round.
    Calibrated by itself, a set would be covered by construction. This is not much better as a measure of coverage: what
    one half has too much, the other has too little. Test items measure it."""
    low, high = central_range(quantiles, share)
    odd, done = np.arange(len(truth)) % 2 == 1, []
    for rows, others in ((odd, ~odd), (~odd, odd)):
        ranges = calibrated_range(quantiles[rows], guess[rows], share, quantiles[others], truth[others])
        low[rows], high[rows], calibrated = ranges
        done.append(calibrated)
    return low, high, all(done)


def widen(low: np.ndarray, guess: np.ndarray, high: np.ndarray, offset: float) -> tuple[np.ndarray, np.ndarray]:
    """Both ends moved outwards by the factor exp(offset), within the prices there are, and never past `guess`: a range
    that left out the price printed beside it would be no range of it."""
    low, high = np.minimum(low * math.exp(-offset), guess), np.maximum(high * math.exp(offset), guess)
    return np.clip(low, MIN_PRICE, MAX_PRICE), np.clip(high, MIN_PRICE, MAX_PRICE)
