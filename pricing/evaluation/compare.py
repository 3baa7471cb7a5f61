"""Two report directories compared item by item.

    python evaluate.py --compare a/report b/report
"""

import csv
from pathlib import Path

import numpy as np

from pricing.data.items import normalise_title
from pricing.evaluation.cells import unguarded
from pricing.evaluation.console import signed
from pricing.evaluation.metrics import paired_difference


def read_predictions(report: str | Path) -> dict[tuple, list[float]]:
    """{(id, title, truth): errors in dollars}, several where items repeat. Raises ValueError where there is no
    predictions.csv, or it is damaged or empty."""
    path = Path(report) / "predictions.csv"
    if not path.is_file():
        raise ValueError(f"{report} is not a report of evaluate.py: it has no predictions.csv")
    errors: dict[tuple, list[float]] = {}
    with open(path, newline="", encoding="utf-8") as handle:
        try:
            for row in csv.DictReader(handle):
                key = unguarded(row["id"]), unguarded(row["title"]), row["truth"]
                errors.setdefault(key, []).append(float(row["error"]))
        except (KeyError, ValueError, TypeError, csv.Error) as problem:
            raise ValueError(f"{path} is damaged or of another version: {problem!r}") from None
    if not errors:
        raise ValueError(f"{path} has no item")
    return errors


def paired_errors(a: str | Path, b: str | Path) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """The errors of two reports, item by item, in dollars, and the items' titles, for paired_difference.

    Raises ValueError where they are not of the same items.
    """
    of_a, of_b = read_predictions(a), read_predictions(b)
    if {key: len(e) for key, e in of_a.items()} != {key: len(e) for key, e in of_b.items()}:
        raise ValueError(
            f"{a} and {b} priced different items ({len(of_a.keys() - of_b.keys()):,} are only in the first, "
            f"{len(of_b.keys() - of_a.keys()):,} only in the second): only errors of the same items can be compared"
        )
    errors_a, errors_b = (np.array([error for key in of_a for error in of[key]]) for of in (of_a, of_b))
    return errors_a, errors_b, [normalise_title(key[1]) for key in of_a for _ in of_a[key]]


def compare_reports(a: str | Path, b: str | Path, seed: int = 0) -> str:
    """The paired difference of two reports in words. Raises ValueError where they are not of the same items."""
    errors_a, errors_b, products = paired_errors(a, b)
    paired = paired_difference(errors_a, errors_b, products, seed)
    low, high = paired["ci95"]
    better = a if high < 0 else b if low > 0 else None
    verdict = "no difference that these items can show"
    if better:
        verdict = f"{better} is better on such items; what another seed would change, this does not say"
    return (
        f"{a}  off by ${errors_a.mean():.2f} on average\n{b}  off by ${errors_b.mean():.2f} on average\n"
        f"first less second, over the same {len(errors_a):,} items: {signed(paired['difference'])} "
        f"(95 % interval {signed(low)} to {signed(high)}): {verdict}"
    )
