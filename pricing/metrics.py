"""How wrong the guesses are, in dollars. Arrays of truths and guesses in, plain numbers out."""

import numpy as np

BANDS = (0, 50, 100, 200, 400, 1000)  # dollars
RESAMPLES = 2000


def colour(truth: float, guess: float) -> str:
    """green: off by less than $40 or 20 %; yellow: less than $80 or 40 %; red otherwise (the reference project's
    rule)."""
    error = abs(truth - guess)
    if error < 40 or error < 0.2 * truth:
        return "green"
    return "yellow" if error < 80 or error < 0.4 * truth else "red"


def bootstrap_interval(values: np.ndarray, seed: int = 0) -> list[float]:
    """95 % interval of the mean, by resampling the items with replacement (percentile bootstrap)  # [low, high]"""
    rng = np.random.default_rng(seed)
    means = [values[rng.integers(0, len(values), len(values))].mean() for _ in range(RESAMPLES)]
    return [float(m) for m in np.percentile(means, [2.5, 97.5])]


def error_by(keys: list, errors: np.ndarray) -> dict:
    """{key: {"n": items, "mae": dollars}}"""
    keys = np.array(keys, dtype=object)
    return {str(k): {"n": int((keys == k).sum()), "mae": float(errors[keys == k].mean())} for k in dict.fromkeys(keys)}


def band_of(price: float) -> str:
    """`$50-100` for 64 dollars; the last band takes all from $400 up"""
    number = max(np.searchsorted(BANDS, price, side="right") - 1, 0)
    number = min(number, len(BANDS) - 2)
    return f"${BANDS[number]}-{BANDS[number + 1]}"


def score(
    truth: np.ndarray, guess: np.ndarray, constant: float, categories: list[str], parse_failures: int = 0
) -> dict:
    """Every metric of the report. Prices in dollars; `constant` is the guess that knows nothing, the mean training
    price.

    mae = mean |truth - guess|; rmsle = sqrt(mean((ln(1 + truth) - ln(1 + guess))^2)); r2 = 1 - squared error /
    variance; hits = share of green; ratio = mae / constant_mae. Raises ValueError for no items or a guess that is no
    number.
    """
    if len(truth) == 0 or len(truth) != len(guess):
        raise ValueError(f"cannot score {len(guess)} guesses of {len(truth)} items")
    if not np.isfinite(guess).all():
        raise ValueError(f"guess {int(np.flatnonzero(~np.isfinite(guess))[0]) + 1} is no number")
    errors = np.abs(truth - guess)
    colours = [colour(t, g) for t, g in zip(truth, guess, strict=True)]
    constant_mae = float(np.abs(truth - constant).mean())
    spread = float(((truth - truth.mean()) ** 2).sum())
    band_order = sorted({band_of(t) for t in truth}, key=lambda band: int(band[1:].split("-")[0]))
    by_band = error_by([band_of(t) for t in truth], errors)
    return {
        "n": len(truth),
        "mae": float(errors.mean()),
        "mae_ci95": bootstrap_interval(errors),
        "median_error": float(np.median(errors)),
        "rmsle": float(np.sqrt(np.mean((np.log1p(truth) - np.log1p(np.maximum(guess, 0))) ** 2))),
        "r2": 1 - float(((truth - guess) ** 2).sum()) / spread if spread else 0.0,
        "hits": colours.count("green") / len(colours),
        **{name: colours.count(name) for name in ("green", "yellow", "red")},
        "parse_failures": parse_failures,
        "constant_mae": constant_mae,
        "ratio": float(errors.mean()) / constant_mae if constant_mae else 0.0,
        "bands": {band: by_band[band] for band in band_order},
        "categories": dict(sorted(error_by([c or "(none)" for c in categories], errors).items())),
    }
