"""Error against items seen, beside a random forest on the same items, from ablation tables, as one picture.

    python -m benchmarks.ablation --rows benchmarks/learning_curve.json --data pc-parts --prompt compact --out curve/
    python -m benchmarks.learning_curve SmolLM2-135M=curve/table.json --out docs/learning_curve.png
"""

import argparse
import json
from pathlib import Path


def points(table: dict) -> tuple[dict[int, list[tuple[int, float]]], list[tuple[int, float]]]:
    """({epochs: [(training items, dollars of error)]}, [(training items, the forest's error)]), items rising"""
    model, forest = {}, {}
    for name, row in table.items():
        if "mae" not in row:
            continue
        options = row["options"]
        items = int(options[options.index("--train-items") + 1]) if "--train-items" in options else row["train_items"]
        epochs = int(options[options.index("--epochs") + 1])
        model.setdefault(epochs, []).append((items, row["mae"]))
        if "random forest" in row["comparison"]:
            forest[items] = row["comparison"]["random forest"]["mae"]
    return {epochs: sorted(found) for epochs, found in sorted(model.items())}, sorted(forest.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tables", nargs="+", metavar="NAME=table.json")
    parser.add_argument("--out", type=Path, default=Path("docs/learning_curve.png"))
    args = parser.parse_args()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.6), layout="constrained")
    for number, (name, path) in enumerate(given.split("=", 1) for given in args.tables):
        model, forest = points(json.loads(Path(path).read_text()))
        for epochs, found in model.items():
            shade = 0.35 + 0.65 * epochs / max(model)
            label = f"{name}, {epochs} epoch{'s' * (epochs > 1)}"
            axes.plot(*zip(*found, strict=True), marker="o", color=f"C{number}", alpha=shade, label=label)
        if not number:
            axes.plot(*zip(*forest, strict=True), "k--", marker="s", label="random forest")
    axes.set(xscale="log", xlabel="training items", ylabel="mean error on validation items, dollars")
    seen = sorted({items for items, _ in forest} | {items for found in model.values() for items, _ in found})
    axes.set_xticks(seen, [f"{items:,}" for items in seen])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    args.out.parent.mkdir(exist_ok=True)
    figure.savefig(args.out, dpi=120)


if __name__ == "__main__":
    main()
