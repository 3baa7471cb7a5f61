"""Error against training rows and parameters: a power law with an offset, fitted to cross-validated runs, as a picture.

    python -m benchmarks.scaling_law SmolLM2-135M:134.5e6=cv-smollm2 Qwen2.5-1.5B:1.54e9=cv-qwen --out docs/scaling.png

Each directory is of benchmarks.cross_validation; its rows differ in --train-items (without it, all). The law is

    E(N, D) = E0 + A N^-a + B D^-b        N parameters, D training rows; E dollars of mean absolute error

with E0 >= 0 and a, b between 0 and 1.5, by least squares on log E (the form is that of Hoffmann et al. 2022, arXiv
2203.15556). The items' titles are resampled 200 times, the errors of all runs taken anew and the law fitted to them:
that is the interval of what it says; of other seeds, other recipes and whether such a law goes on it knows nothing.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from scipy.optimize import least_squares

from pricing.data.items import normalise_title
from pricing.data.sources import load_sources

PUBLISHED = (8.03e9, 400_000, 53.70)  # Llama 3.1 8B, QLoRA on 400,000 rows; its error on all 2,000 items
RESAMPLES = 200


def points(given: list[str]) -> tuple[list[tuple[str, float, int]], np.ndarray, list[str]]:
    """((base, parameters, training rows) of each run, errors (runs, items) in dollars, the items' titles)"""
    items = {item.id: item for item in load_sources("reference:2000").items if item.id.isdigit()}
    runs, errors, ids = [], [], None
    for words in given:
        name, _, directory = words.partition("=")
        name, _, parameters = name.partition(":")
        table = json.loads(Path(directory, "table.json").read_text())
        guesses = json.loads(Path(directory, "guesses.json").read_text())
        for row, guess in guesses.items():
            ids = ids or sorted(guess, key=int)
            if set(ids) != set(guess):
                raise ValueError(f"{directory}, {row}: its items are not those of the first row")
            runs.append((name, float(parameters), table[row]["train_items"]))
            errors.append([abs(float(guess[i]) - items[i].price) for i in ids])
    return runs, np.array(errors), [normalise_title(items[i].title) for i in ids]


def law(values: np.ndarray, parameters, rows) -> np.ndarray:
    """E(N, D) for values (E0, log A, a, log B, b); N and D in units of 1e9 and 1e4"""
    offset, log_a, a, log_b, b = values
    return offset + np.exp(log_a) * (parameters / 1e9) ** -a + np.exp(log_b) * (rows / 1e4) ** -b


def fit(parameters: np.ndarray, rows: np.ndarray, error: np.ndarray) -> np.ndarray:
    """The law's values, the best of several starts"""
    low, high = [0.0, -5.0, 0.0, -5.0, 0.0], [float(error.min()), 5.0, 1.5, 5.0, 1.5]
    tries = []
    for offset in (0.1, 0.5, 0.9):
        for power in (0.1, 0.5):
            start = [offset * high[0], 2.0, power, 2.0, power]
            tries.append(least_squares(
                lambda v: np.log(law(v, parameters, rows)) - np.log(error), start, bounds=(low, high)
            ))  # fmt: skip
    return min(tries, key=lambda result: result.cost).x


def resampled(errors: np.ndarray, titles: list[str], parameters, rows) -> list[np.ndarray]:
    """The law's values for RESAMPLES draws of the items' titles"""
    rng, group = np.random.default_rng(0), np.unique(titles, return_inverse=True)[1]
    sums = np.array([np.bincount(group, row) for row in errors])  # (runs, titles)
    sizes, values = np.bincount(group), []
    for _ in range(RESAMPLES):
        drawn = rng.integers(0, len(sizes), len(sizes))
        values.append(fit(parameters, rows, sums[:, drawn].sum(1) / sizes[drawn].sum()))
    return values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="NAME:PARAMETERS=DIRECTORY")
    parser.add_argument("--out", type=Path, default=Path("docs/scaling.png"))
    args = parser.parse_args()
    runs, errors, titles = points(args.runs)
    parameters, rows = np.array([run[1] for run in runs]), np.array([run[2] for run in runs], float)
    best, draws = fit(parameters, rows, errors.mean(1)), resampled(errors, titles, parameters, rows)

    def say(n: float, d: float) -> str:
        low, high = np.percentile([law(values, n, d) for values in draws], [2.5, 97.5])
        return f"${law(best, n, d):.2f} ({low:.2f} to {high:.2f})"

    for (name, n, d), error in zip(runs, errors.mean(1), strict=True):
        print(f"{name:16} {n / 1e6:6.0f} M  {d:6,} rows  ${error:.2f}  law ${law(best, n, d):.2f}")
    names = ("E0", "log A", "a", "log B", "b")
    for name, value, ends in zip(names, best, np.percentile(draws, [2.5, 97.5], axis=0).T, strict=True):
        print(f"{name:6} {value:.3f} ({ends[0]:.3f} to {ends[1]:.3f})")
    for n, d in ((max(parameters), 4e5), PUBLISHED[:2], (8.03e9, max(rows))):
        print(f"{n / 1e9:.2f} B parameters, {d:,.0f} rows: {say(n, d)}")
    print(f"published: 8.03 B, 400,000 rows: ${PUBLISHED[2]:.2f}")
    draw(args.out, runs, errors.mean(1), best, draws)


def draw(path: Path, runs: list, error: np.ndarray, best: np.ndarray, draws: list[np.ndarray]) -> None:
    """Error against rows, a colour a base, the law's curves and their intervals on to 400,000 rows"""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.8), layout="constrained")
    line = np.geomspace(800, 400_000, 60)
    for number, (name, n) in enumerate(sorted({run[:2] for run in runs}, key=lambda run: run[1])):
        at = [i for i, run in enumerate(runs) if run[0] == name]
        axes.plot([runs[i][2] for i in at], error[at], "o", color=f"C{number}", label=name)
        curves = np.array([law(values, n, line) for values in draws])
        axes.plot(line, law(best, n, line), color=f"C{number}")
        axes.fill_between(line, *np.percentile(curves, [2.5, 97.5], axis=0), color=f"C{number}", alpha=0.12)
    axes.plot(*PUBLISHED[1:], "k*", markersize=12, label="Llama 3.1 8B, published")
    axes.axhline(40, color="#888", linestyle=":", linewidth=1)
    axes.set(xscale="log", xlabel="training rows", ylabel="mean error, dollars", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
