"""The report directory: metrics.json, predictions.csv, scatter.png, comparison.png and report.html, which holds the
pictures and needs no other file. Its template is page.html; compare.py compares two such directories.
"""

import base64
import csv
import html
import json
from pathlib import Path
from string import Template

import numpy as np

from pricing.data.items import Item
from pricing.evaluation.cells import guarded
from pricing.evaluation.console import signed, whole
from pricing.evaluation.metrics import colour

REPORT = ("metrics.json", "predictions.csv", "scatter.png", "comparison.png", "report.html")  # its files
COLUMNS = ["id", "title", "truth", "guess", "low", "high", "error", "colour"]  # of predictions.csv
PAGE = Path(__file__).with_name("page.html")
PAINT = {"green": "#2a9d4a", "yellow": "#d9a400", "red": "#c8332b"}


def write_predictions(path: Path, items: list[Item], guess: np.ndarray, low: np.ndarray, high: np.ndarray) -> None:
    """Write predictions.csv: a line an item, prices in dollars; `low` and `high` are the ends of the range. A title
    that a spreadsheet would run begins with an apostrophe (cells.py)."""
    with open(path, "w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle)
        writer.writerow(COLUMNS)
        for item, g, lo, hi in zip(items, guess, low, high, strict=True):
            prices = [f"{price:.2f}" for price in (item.price, g, lo, hi, abs(item.price - g))]
            writer.writerow([guarded(item.id), guarded(item.title), *prices, colour(item.price, g)])


def comparison_table(comparison: dict[str, dict]) -> tuple[list[str], list[list[str]]]:
    """(header, rows) for the terminal and the page, the least error first. The last column is `above`, the paired
    difference to the first entry of `comparison`, for entries that have one."""
    header = ["predictor", "mean error", "median error", "RMSLE", "hits", "/ constant", "seconds"]
    header += [f"above {next(iter(comparison))} (95%)"]
    rows = []
    for name, m in sorted(comparison.items(), key=lambda pair: pair[1]["mae"]):
        cells = [name, f"${m['mae']:.2f}", f"${m['median_error']:.2f}", f"{m['rmsle']:.3f}", f"{m['hits']:.1%}"]
        cells += [f"{m['ratio']:.3f}", "-" if m.get("seconds") is None else f"{m['seconds']:.1f}"]
        if "above" in m:
            cells += ["{} ({:+.2f} to {:+.2f})".format(signed(m["above"]["difference"]), *m["above"]["ci95"])]
        rows.append(cells if "above" in m else cells + [""])
    return header, rows


def headline(metrics: dict, fallback: float) -> str:
    """What evaluate.py prints at its end; `fallback` dollars were the guess where an answer was not a price"""
    lowest, highest = metrics["mae_ci95"]
    lines = [
        f"\n{metrics['n']:,} held-out items in {metrics['seconds']:.1f} s: off by ${metrics['mae']:.2f} on average "
        f"(95 % interval ${lowest:.2f} to ${highest:.2f}), {metrics['ratio']:.0%} of the constant's "
        f"${metrics['constant_mae']:.2f}; {metrics['coverage']:.1%} inside the {metrics['share']:.0%} range"
    ]
    if (leaks := metrics["leaks"])["share"]:
        others = "" if leaks["mae_without"] is None else f", the others by ${leaks['mae_without']:.2f}"
        lines.append(
            f"{leaks['share']:.0%} of them have a near-duplicate in training ({leaks['threshold']} of their word "
            f"pairs): off by ${leaks['mae_with']:.2f}{others}"
        )
    if (stated := metrics["stated"])["share"]:
        others = "" if stated["mae_without"] is None else f", the others by ${stated['mae_without']:.2f}"
        lines.append(
            f"{stated['share']:.0%} of them have their price in their text, which is no guessing: off by "
            f"${stated['mae_with']:.2f}{others}"
        )
    if "least_mae" in metrics:
        least = f"${metrics['least_mae']:.2f}"
        lines.append(f"the least reachable error on these items is {least}: the catalogue's own noise")
    if failures := metrics["parse_failures"]:
        price = f"${whole(fallback)}, the median training price"
        lines.append(f"{failures} answers were not a price; they count as {price}")
    return "\n".join(lines)


def figure_and_axes(width: float, height: float):
    """Of `width` by `height` inches"""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(width, height), dpi=110, layout="constrained")


def save(figure, path: Path) -> None:
    """Write a figure as PNG and free it"""
    import matplotlib.pyplot as plt

    figure.savefig(path)
    plt.close(figure)


def draw_scatter(path: Path, truth: np.ndarray, guess: np.ndarray, title: str) -> None:
    """Guess against truth in dollars, a dot an item in its colour, with the diagonal where both are equal."""
    figure, axes = figure_and_axes(7, 6.4)
    top = max(float(truth.max()), float(guess.max())) * 1.05
    axes.plot([0, top], [0, top], color="#888", linewidth=1, zorder=1)
    colours = [colour(t, g) for t, g in zip(truth, guess, strict=True)]
    for name, words in (("green", "off by < $40 or 20%"), ("yellow", "< $80 or 40%"), ("red", "more")):
        chosen = np.array([c == name for c in colours])
        label = f"{words}: {chosen.mean():.0%}"
        axes.scatter(
            truth[chosen], guess[chosen], s=14, alpha=0.7, color=PAINT[name], label=label, edgecolors="none", zorder=2
        )
    axes.set(xlabel="true price, dollars", ylabel="guess, dollars", title=title, xlim=(0, top), ylim=(0, top))
    axes.legend(loc="upper left", frameon=False)
    axes.grid(alpha=0.2)
    save(figure, path)


def draw_comparison(path: Path, comparison: dict[str, dict]) -> None:
    """Mean absolute error of each predictor with its 95 % interval, best on top; the first entry is the model's."""
    ours = next(iter(comparison))
    ranked = sorted(comparison.items(), key=lambda pair: -pair[1]["mae"])
    figure, axes = figure_and_axes(7.6, 0.42 * len(ranked) + 0.9)
    names, values = [name for name, _ in ranked], np.array([m["mae"] for _, m in ranked])
    ends = np.array([m["mae_ci95"] for _, m in ranked]).T  # (2, predictors)
    bars = axes.barh(names, values, color=["#2b6cb0" if name == ours else "#b8c4d0" for name in names])
    axes.errorbar(values, names, xerr=np.abs(ends - values), fmt="none", ecolor="#444", elinewidth=1, capsize=2)
    for bar, value, end in zip(bars, values, ends[1], strict=True):
        axes.annotate(f"${value:.2f}", (end, bar.get_y() + bar.get_height() / 2), (5, 0), va="center",
                      textcoords="offset points")  # fmt: skip
    axes.set(xlabel="mean absolute error, dollars, with its 95% interval", xlim=(0, ends.max() * 1.15))
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def html_table(header: list[str], rows: list[list[str]], strong: str = "") -> str:
    """A table of escaped cells; the row whose first cell is `strong` stands out."""
    cells = "".join(f"<th>{html.escape(c)}</th>" for c in header)
    body = ""
    for row in rows:
        mark = " class=ours" if row[0] == strong else ""
        body += f"<tr{mark}>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>"
    return f"<div class=scroll><table><tr>{cells}</tr>{body}</table></div>"


def groups_table(name: str, groups: dict[str, dict], total: float) -> str:
    """Errors by price band or category, at most 40; `total` is the sum of all errors in dollars."""
    header = [name, "items", "mean error", "share of all error", "bias", "inside the range", "width of the range"]
    rows = [
        [key, f"{g['n']:,}", f"${g['mae']:.2f}", f"{g['n'] * g['mae'] / total if total else 0:.0%}", signed(g["bias"]),
         f"{g['coverage']:.0%}", f"${g['width']:.0f}"]
        for key, g in list(groups.items())[:40]
    ]  # fmt: skip
    return html_table(header, rows)


def items_table(items: list[Item], guess: np.ndarray, interval: tuple[np.ndarray, np.ndarray], chosen) -> str:
    """The items of the indices `chosen`, in this order: text, truth, guess, range, error"""
    rows = ""
    for i in chosen:
        price, text = items[i].price, items[i].text
        first, *others = (text[:300] + ("..." if len(text) > 300 else "")).splitlines()
        words = f"<b>{html.escape(first)}</b> " + html.escape(" \N{MIDDLE DOT} ".join(filter(None, others)))
        rows += (
            f'<tr><td><span class="dot {colour(price, guess[i])}"></span>{words}</td><td>${price:,.2f}</td>'
            f"<td>${whole(guess[i])}</td><td>${whole(interval[0][i])} to ${whole(interval[1][i])}</td>"
            f"<td>${abs(price - guess[i]):,.2f}</td></tr>"
        )
    head = "<tr><th>text</th><th>truth</th><th>guess</th><th>range</th><th>off by</th></tr>"
    return f'<div class=scroll><table class="items">{head}{rows}</table></div>'


def picture_source(path: Path) -> str:
    """A picture as the address of an <img>, so that the page needs no other file"""
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def page(directory: Path, metrics: dict, comparison: dict, items: list[Item], guess, interval, description: str) -> str:
    """report.html as text; the pictures of `directory` are embedded. Arguments as for write_report."""
    m, (low, high), total = metrics, metrics["mae_ci95"], metrics["mae"] * metrics["n"]
    shares = "".join(
        f'<span class="bar {name}" style="width:{m[name] / m["n"]:.2%}" title="{m[name]} {name}"></span>'
        for name in ("green", "yellow", "red")
    )
    least = f" The least reachable error on these items is ${m['least_mae']:.2f}." if "least_mae" in m else ""
    others = sorted((c["mae"], name) for name, c in list(comparison.items())[1:])
    best = f" The best of the other predictors here, {others[0][1]}, is off by ${others[0][0]:.2f}." if others else ""
    truth = np.array([item.price for item in items])
    errors = np.abs(truth - guess)
    worst, best_relative = (np.argsort(values, kind="stable")[:20] for values in (-errors, errors / truth))
    by_error = dict(sorted(m["categories"].items(), key=lambda pair: -pair[1]["n"] * pair[1]["mae"]))
    return Template(PAGE.read_text(encoding="utf-8")).substitute(
        n=f"{m['n']:,}",
        mae=f"${m['mae']:.2f}",
        low=f"${low:.2f}",
        high=f"${high:.2f}",
        median_error=f"${m['median_error']:.2f}",
        constant_mae=f"${m['constant_mae']:.2f}",
        ratio=f"{m['ratio']:.0%}",
        best_other=best,
        least_error=least,
        shares=shares,
        hits=f"{m['hits']:.1%}",
        description=html.escape(description),
        comparison_png=picture_source(directory / "comparison.png"),
        comparison_table=html_table(*comparison_table(comparison), next(iter(comparison))),
        scatter_png=picture_source(directory / "scatter.png"),
        share=f"{m['share']:.0%}",
        coverage=f"{m['coverage']:.1%}",
        width=f"${m['width']:.0f}",
        bands_table=groups_table("price", m["bands"], total),
        categories_table=groups_table("category", by_error, total),
        worst_table=items_table(items, guess, interval, worst),
        best_table=items_table(items, guess, interval, best_relative),
    )


def write_report(
    directory: Path,
    metrics: dict,
    items: list[Item],
    guess: np.ndarray,
    interval: tuple[np.ndarray, np.ndarray],
    comparison: dict[str, dict],
    description: str,
) -> None:
    """Write the report's files into an empty directory.

    `guess` (n,) and `interval`, two arrays (n,), are in dollars; `comparison` maps each predictor to its metrics, the
    fine-tuned model first; `description` is what the page says of the run.
    """
    truth = np.array([item.price for item in items])
    (directory / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    write_predictions(directory / "predictions.csv", items, guess, *interval)
    title = f"{metrics['n']:,} held-out products, off by ${metrics['mae']:.2f} on average"
    draw_scatter(directory / "scatter.png", truth, guess, title)
    draw_comparison(directory / "comparison.png", comparison)
    text = page(directory, metrics, comparison, items, guess, interval, description)
    (directory / "report.html").write_text(text, encoding="utf-8")
