"""Speed against memory from the JSON files of train_speed.py and memory.py, as one picture.

    python -m benchmarks.chart benchmarks/results/h100-8b-*.json --out docs/speed.png
"""

import argparse
import json
from pathlib import Path
from statistics import mean, median

COLOURS = {"ours": "tab:green", "unsloth": "tab:orange", "peft": "tab:gray"}


def points(file: Path) -> list[tuple[str, str, float, float]]:
    """(implementation, label, peak GiB, tokens/s) of every row that was measured"""
    content = json.loads(file.read_text())
    rows = content["rows"] if isinstance(content, dict) else content
    found = []
    for row in rows:
        if "failed" not in row:
            impl = row.get("impl", "ours")
            batch = content["settings"]["batch"] if isinstance(content, dict) else row["batch"]
            what = f"budget {row['budget']}" if "budget" in row else row["settings"].split(", ")[0]
            label = f"batch {batch}, {what}"
            speed = 1000 * mean(row["tokens"]) / median(row["step_ms"])
            found.append((impl, f"{impl}: {label}", row["peak_gib"], speed))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs/speed.png"))
    args = parser.parse_args()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.6), layout="constrained")
    found = [point for file in args.files for point in points(file)]
    for impl, label, memory, speed in found:
        axes.scatter(memory, speed, s=60, color=COLOURS.get(impl, "tab:blue"))
        axes.annotate(label, (memory, speed), (7, 5), textcoords="offset points", fontsize=8)
    axes.set(xlabel="peak GPU memory, GiB", ylabel="training, tokens/s", ylim=(0, 1.1 * max(p[3] for p in found)))
    axes.set_xlim(0, 1.35 * max(p[2] for p in found))  # room for the labels
    axes.grid(alpha=0.3)
    args.out.parent.mkdir(exist_ok=True)
    figure.savefig(args.out, dpi=120)


if __name__ == "__main__":
    main()
