"""Price ranges that contain the true price as often as they promise, and quantiles of a distribution over prices.

The middle 80 % of a model's own distribution is only right if the model is calibrated, and fine-tuned networks are not.
Conformalised quantile regression (Romano, Patterson and Candes 2019, arXiv 1905.03222) takes a calibration set, n items
that were not trained on, and measures how far each true price lies outside its range [low, high], negative inside:

    score_i = max(log(low_i / price_i), log(price_i / high_i))

Both ends then move outwards by the (n + 1) share-th smallest score. If these items and a new one are exchangeable, the
k-th smallest of n scores is at least the new one with probability k / (n + 1), however wrong the model is (a little
more where scores are equal). (n + 1) share is seldom whole: the paper rounds it up, which makes 80 % into 83 % after
23 items; here it lies between two scores in proportion, and the mean coverage is the share itself within about one per
cent from 20 items on (tests/pricing/test_intervals.py draws many small sets). That is the mean over calibration sets:
after a single one of n items the share that is covered has a standard deviation of about sqrt(share (1 - share) / n),
9 % after 20 and 1.3 % after 1,000. It holds on average over all products, not for each kind of product. The
calibration set is the run's validation items. Where these also chose the weights (`--keep best`), the model knows them
a little better than new items; what that costs in coverage is measured on test items.

A range always holds the guess, so only the end on the price's side of the guess can miss it, and the score is that
end's alone: where a model is far off to one side and its ranges are far too wide, the other end would say too little.

The scores are in log price, not in dollars, because errors grow with the price: the ends move by a factor. An offset in
dollars that is right for a $500 graphics card would make the range of a $10 cable useless.
"""

import math

import numpy as np

from pricing.data.items import MAX_PRICE, MIN_PRICE

SHARE = 0.8
LEVELS = (0.025, *(n / 20 for n in range(1, 20)), 0.975)  # of the 21 quantiles that are stored of a prediction
MIDDLE = len(LEVELS) // 2


def in_dollars(log_price: np.ndarray) -> np.ndarray:
    """exp of a log price, within the prices that there are, 0.50 to 999.49 dollars"""
    return np.clip(np.exp(log_price), MIN_PRICE, MAX_PRICE)


def log_quantiles(distribution: np.ndarray) -> np.ndarray:
    """P(price) (n, 1000) -> quantiles of the log price at LEVELS (n, 21), log dollars. The probability of a whole
    dollar d is spread evenly from d - 0.5 to d + 0.5."""
    edges = np.clip(np.arange(distribution.shape[1] + 1) - 0.5, MIN_PRICE, MAX_PRICE)
    reached = np.concatenate([np.zeros((len(distribution), 1)), np.cumsum(distribution, axis=1)], axis=1)
    # np.interp needs rising values; where prices of probability 0 lie between, any of them would do.
    quantiles = [np.interp(LEVELS, row + 1e-12 * np.arange(len(row)), edges) for row in reached]
    return np.log(np.array(quantiles).reshape(-1, len(LEVELS)))


def central_range(quantiles: np.ndarray, share: float = SHARE) -> tuple[np.ndarray, np.ndarray]:
    """(low, high) in dollars, each (n,): the middle `share` of quantiles (n, 21) in log dollars, interpolated between
    two levels. Raises ValueError for a share above 0.95."""
    if not 0 < share <= LEVELS[-1] - LEVELS[0] + 1e-9:
        raise ValueError(f"a range can promise at most 95 % of the prices, not {share:.0%}")
    ends = [(1 - share) / 2, (1 + share) / 2]
    low, high = (np.array([np.interp(end, LEVELS, row) for row in quantiles]).reshape(-1) for end in ends)
    return in_dollars(low), in_dollars(high)


def conformal_rank(n: int, share: float) -> float:
    """(n + 1) share: which of the n scores, sorted, decides, counted from 1; more than n where n is too small"""
    return round((n + 1) * share, 9)  # 100 * 0.07 is 7.000000000000001


def conformal_offset(
    low: np.ndarray, high: np.ndarray, truth: np.ndarray, share: float = SHARE, guess: np.ndarray | None = None
) -> float:
    """How far to move both ends outwards, in log price; negative where ranges are too wide. All arrays (n,) dollars;
    `guess` is what each range will hold anyway.

    Raises ValueError for too few items (share / (1 - share) are needed) and for prices that are not positive.
    """
    n = len(truth)
    if not 0 < share < 1 or not len(low) == len(high) == n:
        raise ValueError(f"cannot calibrate {len(low)} to {len(high)} ranges on {n} prices for a share of {share}")
    if n == 0 or not (np.minimum(np.minimum(low, high), truth) > 0).all():  # NaN fails this too
        raise ValueError("ranges are calibrated on positive prices in dollars, at least one")
    below, above = np.log(low / truth), np.log(truth / high)
    scores = np.maximum(below, above)
    if guess is not None:
        scores = np.where(truth < guess, below, above)
    if (rank := conformal_rank(n, share)) > n:
        raise ValueError(
            f"{n} validation items are too few to calibrate a range that contains {share:.0%} of the prices: "
            f"{math.ceil(round(share / (1 - share), 9))} are needed"
        )
    return float(np.interp(rank, np.arange(1, n + 1), np.sort(scores)))


def calibrated_range(
    quantiles: np.ndarray, guess: np.ndarray, share: float, calibration: np.ndarray, truth: np.ndarray
) -> tuple[np.ndarray, np.ndarray, bool]:
    """(low, high, whether they are calibrated), low and high (n,) dollars: the middle `share` of quantiles (n, 21),
    moved by conformal_offset of the calibration set, whose quantiles are `calibration` (m, 21) and whose prices `truth`
    (m,) dollars; not moved where m is too small. `guess` (n,) dollars always lies in its range."""
    low, high = central_range(quantiles, share)
    enough = conformal_rank(len(truth), share) <= len(truth)
    middle = in_dollars(calibration[:, MIDDLE])
    offset = conformal_offset(*central_range(calibration, share), truth, share, middle) if enough else 0.0
    return *widen(low, guess, high, offset), enough


def cross_calibrated_range(quantiles: np.ndarray, guess: np.ndarray, share: float, truth: np.ndarray) -> tuple:
    """As calibrated_range, for the validation items themselves: the even rows are calibrated by the odd ones, and the
    other way round. Calibrated by itself, a set would be covered by construction. As a measure of coverage this is
    still poor, since too much in one half means too little in the other: measure coverage on test items."""
    low, high = central_range(quantiles, share)
    odd, enough = np.arange(len(truth)) % 2 == 1, []
    for rows, others in ((odd, ~odd), (~odd, odd)):
        ranges = calibrated_range(quantiles[rows], guess[rows], share, quantiles[others], truth[others])
        low[rows], high[rows], calibrated = ranges
        enough.append(calibrated)
    return low, high, all(enough)


def widen(low: np.ndarray, guess: np.ndarray, high: np.ndarray, offset: float) -> tuple[np.ndarray, np.ndarray]:
    """Both ends moved outwards by the factor exp(offset), within 0.50 to 999.49 dollars, and never past `guess`:
    a range contains the price that is printed beside it."""
    low, high = np.minimum(low * math.exp(-offset), guess), np.maximum(high * math.exp(offset), guess)
    return np.clip(low, MIN_PRICE, MAX_PRICE), np.clip(high, MIN_PRICE, MAX_PRICE)
