"""The report directory: metrics.json, predictions.csv, scatter.png, comparison.png, report.html (needs no other
file)."""

import base64
import csv
import html
import json
from pathlib import Path

import numpy as np

from pricing.items import Item
from pricing.metrics import colour

PAINT = {"green": "#2a9d4a", "yellow": "#d9a400", "red": "#c8332b"}
STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:960px;margin:2em auto;padding:0 1em;color:#222}
h1{font-size:1.5em}h2{font-size:1.15em;margin-top:2em}img{max-width:100%}
table{border-collapse:collapse;margin:.5em 0}td,th{padding:.25em .8em;border-bottom:1px solid #ddd;
text-align:right;vertical-align:top}
td:first-child,th:first-child{text-align:left}.big{font-size:2.2em;font-weight:600}
.bar{height:14px;display:inline-block}.green{background:#2a9d4a}.yellow{background:#d9a400}.red{background:#c8332b}
.note{color:#666}td.text{text-align:left;font-size:.85em;color:#444;max-width:34em}"""


def write_predictions(path: Path, items: list[Item], guess: np.ndarray, low: np.ndarray, high: np.ndarray) -> None:
    """One line an item; all prices in dollars, `low` and `high` bound the middle 80 % of the distribution."""
    with open(path, "w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle)
        writer.writerow(["id", "title", "truth", "guess", "low", "high", "error", "colour"])
        for item, g, lo, hi in zip(items, guess, low, high, strict=True):
            error = f"{abs(item.price - g):.2f}"
            writer.writerow(
                [
                    item.id,
                    item.title,
                    f"{item.price:.2f}",
                    f"{g:.2f}",
                    f"{lo:.0f}",
                    f"{hi:.0f}",
                    error,
                    colour(item.price, g),
                ]
            )


def draw_scatter(path: Path, truth: np.ndarray, guess: np.ndarray, title: str) -> None:
    """Guess against truth, coloured, with the diagonal where they are equal."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 6.4), dpi=110)
    top = max(float(truth.max()), float(guess.max())) * 1.05
    axes.plot([0, top], [0, top], color="#888", linewidth=1, zorder=1)
    colours = [colour(t, g) for t, g in zip(truth, guess, strict=True)]
    for name, words in (("green", "off by < $40 or 20 %"), ("yellow", "< $80 or 40 %"), ("red", "more")):
        chosen = np.array([c == name for c in colours])
        label = f"{words}: {chosen.mean():.0%}"
        axes.scatter(
            truth[chosen], guess[chosen], s=14, alpha=0.7, color=PAINT[name], label=label, edgecolors="none", zorder=2
        )
    axes.set(xlabel="true price, dollars", ylabel="guess, dollars", title=title, xlim=(0, top), ylim=(0, top))
    axes.legend(loc="upper left", frameon=False)
    axes.grid(alpha=0.2)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def draw_comparison(path: Path, maes: dict[str, float]) -> None:
    """Mean absolute error of each predictor, best on top. The fine-tuned model is the first entry of `maes`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ours = next(iter(maes))
    ranked = sorted(maes.items(), key=lambda pair: -pair[1])
    figure, axes = plt.subplots(figsize=(7, 0.5 * len(ranked) + 1.3), dpi=110)
    names, values = zip(*ranked, strict=True)
    bars = axes.barh(names, values, color=["#2b6cb0" if name == ours else "#b8c4d0" for name in names])
    axes.bar_label(bars, labels=[f" ${value:.2f}" for value in values])
    axes.set(xlabel="mean absolute error, dollars", xlim=(0, max(values) * 1.15))
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def html_table(header: list[str], rows: list[list[str]]) -> str:
    cells = "".join(f"<th>{html.escape(c)}</th>" for c in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows)
    return f"<table><tr>{cells}</tr>{body}</table>"


def worst_table(items: list[Item], guess: np.ndarray, count: int = 20) -> str:
    errors = np.abs(np.array([item.price for item in items]) - guess)
    rows = "".join(
        f"<tr><td class=text>{html.escape(items[i].text[:240])}</td><td>${items[i].price:,.2f}</td>"
        f"<td>${guess[i]:,.0f}</td><td>${errors[i]:,.2f}</td></tr>"
        for i in np.argsort(-errors)[:count]
    )
    return f"<table><tr><th>text</th><th>truth</th><th>guess</th><th>off by</th></tr>{rows}</table>"


def write_html(
    path: Path, metrics: dict, comparison: list[list[str]], items: list[Item], guess: np.ndarray, about: str
) -> None:
    """One self-contained page; the pictures beside `path` are embedded."""

    def picture(name: str) -> str:
        data = base64.b64encode((path.parent / name).read_bytes()).decode()
        return f'<img alt="{name}" src="data:image/png;base64,{data}">'

    low, high = metrics["mae_ci95"]
    shares = "".join(
        f'<span class="bar {name}" style="width:{metrics[name] / metrics["n"]:.2%}" title="{metrics[name]} {name}">'
        "</span>"
        for name in ("green", "yellow", "red")
    )
    floor = (
        f" The least reachable error on these items is ${metrics['least_mae']:.2f}." if "least_mae" in metrics else ""
    )
    bands = [[band, f"{row['n']:,}", f"${row['mae']:.2f}"] for band, row in metrics["bands"].items()]
    kinds = [[name, f"{row['n']:,}", f"${row['mae']:.2f}"] for name, row in metrics["categories"].items()]
    path.write_text(
        f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>How far off are the prices?</title>
<style>{STYLE}</style>
<h1>How far off are the prices?</h1>
<p><span class="big">${metrics["mae"]:.2f}</span> on average, over {metrics["n"]:,} products it was not trained on
(95 % interval ${low:.2f} to ${high:.2f}). Half of the guesses are off by less than ${metrics["median_error"]:.2f}.
Guessing the mean price for everything is off by ${metrics["constant_mae"]:.2f}: the model's error is
{metrics["ratio"]:.0%} of that.{floor}</p>
<div style="width:100%;white-space:nowrap;font-size:0">{shares}</div>
<p class="note">{metrics["hits"]:.1%} green: off by less than $40 or 20 %. Yellow: less than $80 or 40 %. Red: more.</p>
<p class="note">{html.escape(about)}</p>
<h2>Against other predictors</h2>{picture("comparison.png")}
{html_table(["predictor", "mean error", "median error", "RMSLE", "hits", "/ constant"], comparison)}
<h2>Guess against truth</h2>{picture("scatter.png")}
<h2>By price</h2>{html_table(["price", "items", "mean error"], bands)}
<h2>By category</h2>{html_table(["category", "items", "mean error"], kinds)}
<h2>The twenty worst</h2>{worst_table(items, guess)}
</html>
""",
        encoding="utf-8",
    )


def write_report(
    directory: Path,
    metrics: dict,
    items: list[Item],
    guess: np.ndarray,
    interval: tuple[np.ndarray, np.ndarray],
    comparison: dict[str, dict],
    about: str,
) -> None:
    """Fill an empty directory. `comparison` maps each predictor to its metrics, the fine-tuned model first."""
    truth = np.array([item.price for item in items])
    (directory / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    write_predictions(directory / "predictions.csv", items, guess, *interval)
    draw_scatter(
        directory / "scatter.png",
        truth,
        guess,
        f"{metrics['n']:,} held-out products, off by ${metrics['mae']:.2f} on average",
    )
    draw_comparison(directory / "comparison.png", {name: m["mae"] for name, m in comparison.items()})
    write_html(directory / "report.html", metrics, comparison_rows(comparison), items, guess, about)


def comparison_rows(comparison: dict[str, dict]) -> list[list[str]]:
    """Cells of the table, for the terminal and the page"""
    return [
        [
            name,
            f"${m['mae']:.2f}",
            f"${m['median_error']:.2f}",
            f"{m['rmsle']:.3f}",
            f"{m['hits']:.1%}",
            f"{m['ratio']:.3f}",
        ]
        for name, m in comparison.items()
    ]
