"""Records a second and peak memory of `python -m pricing.curation` on generated listings.

    python -m benchmarks.curate_speed --records 1000000        about 3 GB under the temporary directory, removed after

The listings have the shape and the size of Amazon-Reviews-2023's raw_meta_*: 3.0 kB each on average (its Appliances:
285 MB for 94,327). Half have no price; of the rest two in three pass the rules, so a third of all are candidates. Of
those with a price 2 % repeat an earlier one, 8 % an earlier one with two words of the text and one of the title
changed; 0.1 % of the lines are cut short. Memory is the greatest sum of the resident sizes of the process and its
workers, read from /proc five times a second; what they share is counted for each. Seconds of CPU are of all of them:
on cores that are shared with others they say more than the clock.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LETTERS = "etaoinshrdlucmfwypvbgkjqxz"
FILES = ("Automotive", "Electronics", "Appliances", "Tools_and_Home_Improvement")


def phrases(rng: random.Random, count: int = 20_000) -> list[str]:
    """Four words each, common words more often, so that unlike texts share a few pairs of words."""
    lengths, weights = range(2, 10), range(len(LETTERS), 0, -1)
    words = ["".join(rng.choices(LETTERS, weights, k=rng.choice(lengths))) for _ in range(8_000)]
    weights = [1 / (rank + 5) for rank in range(len(words))]
    return [" ".join(rng.choices(words, weights, k=4)) for _ in range(count)]


def change(lines: list[str], rng: random.Random, count: int) -> list[str]:
    """The same lines with `count` words changed"""
    lines = list(lines)
    for _ in range(count):
        place = rng.randrange(len(lines))
        words = lines[place].split()
        words[rng.randrange(len(words))] = f"changed{rng.randrange(1000)}"
        lines[place] = " ".join(words)
    return lines


def records(count: int, seed: int):
    """Lines of JSON"""
    rng = random.Random(seed)
    said, recent = phrases(rng), []
    for number in range(count):
        price = None if rng.random() < 0.5 else round(0.6 + 900 * rng.random() ** 4, 2)
        title = " ".join(rng.choices(said, k=3)).title()
        lines = [" ".join(rng.choices(said, k=rng.randrange(3, 12))) for _ in range(rng.choice((0, 1, 3, 5, 6, 8)))]
        kind = rng.random()
        if price and kind < 0.10 and len(recent) == 500:
            title, lines = recent[rng.randrange(500)]
            if kind < 0.08:
                title, lines = change([title], rng, 1)[0], change(lines, rng, 2)
        elif price and len(lines) > 3:
            recent = [*recent[-499:], (title, lines)]
        image = f"https://m.media-amazon.com/images/I/{rng.getrandbits(48):012x}"
        record = {
            "main_category": "Tools & Home Improvement", "title": title, "average_rating": 4.3,
            "rating_number": number % 977, "features": lines[1:], "description": lines[:1], "price": price,
            "images": [
                {"thumb": f"{image}._AC_US40_.jpg", "large": f"{image}._AC_.jpg", "variant": f"PT0{view}",
                 "hi_res": f"{image}._AC_SL1500_.jpg"} for view in range(6)
            ],
            "videos": [], "store": "Acme", "categories": ["Appliances", "Parts & Accessories", "Dryer Parts"],
            "details": {
                "Manufacturer": "Acme", "Part Number": f"WE1M{number}", "Item Weight": "5.6 ounces",
                "Package Dimensions": "5.5 x 4.7 x 0.4 inches", "Item model number": f"WE1M{number}",
                "Is Discontinued By Manufacturer": "No", "Batteries Included?": "No",
                "Best Sellers Rank": {"Tools & Home Improvement": 1315213 + number, "Parts & Accessories": number},
                "Date First Available": "February 25, 2014",
            },
            "parent_asin": f"B{number:09}", "bought_together": None,
        }  # fmt: skip
        line = json.dumps(record)
        yield line[: len(line) // 2] if rng.random() < 0.001 else line


def resident(pid: int) -> int:
    """Bytes in memory of a process and of those it started"""
    total = 0
    try:
        total += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096
        for thread in Path(f"/proc/{pid}/task").iterdir():
            total += sum(resident(int(child)) for child in (thread / "children").read_text().split())
    except (OSError, IndexError):  # it has just ended
        pass
    return total


def run(command: list[str]) -> tuple[float, float, int, str]:
    """(seconds, seconds of CPU, greatest bytes in memory, what it printed)"""
    start, peak, before = time.perf_counter(), 0, os.times()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    while process.poll() is None:
        peak = max(peak, resident(process.pid))
        time.sleep(0.2)
    if process.returncode:
        sys.exit(f"{' '.join(command)} ended with {process.returncode}")
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return time.perf_counter() - start, cpu, peak, process.stdout.read()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=200_000, help="listings to generate (default: 200000)")
    parser.add_argument("--workers", type=int, default=2, help="of pricing.curation (default: 2)")
    parser.add_argument("--preset", nargs="+", default=["first", "second"], help="(default: first second)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        files, size = [], 0
        for number, name in enumerate(FILES):
            path = Path(folder) / f"meta_{name}.jsonl"
            with open(path, "w") as file:
                file.writelines(f"{line}\n" for line in records(args.records // len(FILES), args.seed + number))
            files.append(str(path))
            size += path.stat().st_size
        print(f"{args.records:,} records, {size / 1e9:.2f} GB\n")
        for preset in args.preset:
            for near in ("0.8", "0"):
                out = Path(folder) / f"{preset}-{near}.parquet"
                command = [sys.executable, "-m", "pricing.curation", *files, "--out", str(out), "--preset", preset]
                seconds, cpu, peak, said = run([*command, "--near", near, "--workers", str(args.workers)])
                print(f"--preset {preset} --near {near}: {args.records / seconds:,.0f} records/s from start to end, "
                      f"{seconds:.1f} s, {cpu:.1f} s of CPU, {peak / 2**20:,.0f} MiB\n{said}")  # fmt: skip
                out.unlink()


if __name__ == "__main__":
    main()
