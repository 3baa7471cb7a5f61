"""How wrong the guesses are, in dollars. Arrays of true prices and guesses in, plain numbers out."""

import numpy as np

BANDS = (0, 50, 100, 200, 400, 1000)  # dollars
RESAMPLES = 2000  # of the bootstrap


def colour(truth: float, guess: float) -> str:
    """green: off by less than $40 or 20 % of the truth; yellow: less than $80 or 40 %; red: more (the reference
    project's rule)."""
    error = abs(truth - guess)
    if error < 40 or error < 0.2 * truth:
        return "green"
    return "yellow" if error < 80 or error < 0.4 * truth else "red"


def bootstrap_interval(values: np.ndarray, groups: list[str] | None = None, seed: int = 0) -> list[float]:
    """[low, high]: the 95 % interval of the mean, by resampling with replacement (percentile bootstrap)

    `groups` names the group of each item, and whole groups are drawn. Items of one title are variants of one product
    with similar errors, and the split keeps them together; drawn one by one they would count as so many products, and
    the interval would be too narrow (by a fifth on pc-parts). Without `groups` each item is drawn by itself.
    """
    rng = np.random.default_rng(seed)
    of = np.arange(len(values)) if groups is None else np.unique(groups, return_inverse=True)[1]
    sums, sizes = np.bincount(of, values), np.bincount(of)
    drawn = (rng.integers(0, len(sums), len(sums)) for _ in range(RESAMPLES))
    means = [sums[which].sum() / sizes[which].sum() for which in drawn]
    return [float(m) for m in np.percentile(means, [2.5, 97.5])]


def paired_difference(
    errors_a: np.ndarray, errors_b: np.ndarray, groups: list[str] | None = None, seed: int = 0
) -> dict:
    """{"difference": mean error of a less that of b on the same items, in dollars, "ci95": its 95 % interval}. Where it
    lies below 0, a is better.

    Items are resampled, by `groups`, with both of their errors: what makes an item hard for both cancels out, so the
    interval is narrower than the two separate ones suggest. It tells what other items might give, not what another seed
    of either training would. Raises ValueError for no items or for unequal numbers of errors.
    """
    if len(errors_a) == 0 or len(errors_a) != len(errors_b):
        raise ValueError(f"cannot compare the errors of {len(errors_a)} items with those of {len(errors_b)}")
    difference = np.asarray(errors_a, dtype=float) - np.asarray(errors_b, dtype=float)
    return {"difference": float(difference.mean()), "ci95": bootstrap_interval(difference, groups, seed)}


def mean_by(keys: list[str], columns: dict[str, np.ndarray]) -> dict:
    """{key: {"n": items, column: its mean over them}}"""
    rows: dict[str, list[int]] = {}
    for number, key in enumerate(keys):
        rows.setdefault(key, []).append(number)
    return {
        key: {"n": len(at), **{name: float(values[at].mean()) for name, values in columns.items()}}
        for key, at in rows.items()
    }


def error_apart(errors: np.ndarray, chosen: list[int]) -> dict:
    """{"share": of the items that are `chosen`, "mae_with", "mae_without": mean error of these and of the others, None
    of no items}"""
    others = np.setdiff1d(np.arange(len(errors)), chosen)
    means = [float(errors[part].mean()) if len(part) else None for part in (chosen, others)]
    return {"share": len(chosen) / len(errors)} | dict(zip(("mae_with", "mae_without"), means, strict=True))


def band_of(price: float) -> str:
    """`$50-100` for 64 dollars; the last band holds all prices from $400 up"""
    number = max(np.searchsorted(BANDS, price, side="right") - 1, 0)
    number = min(number, len(BANDS) - 2)
    return f"${BANDS[number]}-{BANDS[number + 1]}"


def score(
    truth: np.ndarray,
    guess: np.ndarray,
    constant: float,
    categories: list[str],
    parse_failures: int = 0,
    interval: tuple[np.ndarray, np.ndarray] | None = None,
    groups: list[str] | None = None,
) -> dict:
    """Every metric of the report. Prices in dollars; `constant` is one guess for all items, the mean training price;
    `interval` is the range (low, high) of each item, `groups` what mae_ci95 is resampled by (bootstrap_interval).

    mae = mean |truth - guess|; bias = mean(guess - truth); rmsle = sqrt(mean((ln(1 + truth) - ln(1 + guess))^2));
    smape = mean(2 |truth - guess| / (truth + guess)), 0 to 2; r2 = 1 - squared error / variance; hits = share of
    green; ratio = mae / constant_mae; coverage = share of the items with low <= truth <= high; width = mean(high -
    low). Raises ValueError for no items or a guess that is not finite.
    """
    if len(truth) == 0 or len(truth) != len(guess):
        raise ValueError(f"cannot score {len(guess)} guesses of {len(truth)} items")
    if not np.isfinite(guess).all():
        raise ValueError(f"guess {int(np.flatnonzero(~np.isfinite(guess))[0]) + 1} is not a number")
    errors = np.abs(truth - guess)
    colours = [colour(t, g) for t, g in zip(truth, guess, strict=True)]
    constant_mae = float(np.abs(truth - constant).mean())
    spread = float(((truth - truth.mean()) ** 2).sum())
    columns = {"mae": errors, "bias": guess - truth}
    if interval is not None:
        low, high = interval
        columns |= {"coverage": (low <= truth) & (truth <= high), "width": high - low}
    bands = mean_by([band_of(t) for t in truth], columns)
    return {
        "n": len(truth),
        "mae": float(errors.mean()),
        "mae_ci95": bootstrap_interval(errors, groups),
        "median_error": float(np.median(errors)),
        **{name: float(values.mean()) for name, values in columns.items() if name != "mae"},
        "rmsle": float(np.sqrt(np.mean((np.log1p(truth) - np.log1p(np.maximum(guess, 0))) ** 2))),
        "smape": float(np.mean(2 * errors / (truth + np.maximum(guess, 0)))),
        "r2": 1 - float(((truth - guess) ** 2).sum()) / spread if spread else 0.0,
        "hits": colours.count("green") / len(colours),
        **{name: colours.count(name) for name in ("green", "yellow", "red")},
        "parse_failures": parse_failures,
        "constant_mae": constant_mae,
        "ratio": float(errors.mean()) / constant_mae if constant_mae else 0.0,
        "bands": dict(sorted(bands.items(), key=lambda pair: int(pair[0][1:].split("-")[0]))),
        "categories": dict(sorted(mean_by([c or "(none)" for c in categories], columns).items())),
    }
