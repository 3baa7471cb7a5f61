"""What `--data` names: the built-in catalogue, pc-parts, a file, or a data set of the Hugging Face hub."""

import json
import os
import zipfile
from dataclasses import replace
from pathlib import Path

from common.hub import cache_directory, download, sha256, snapshot
from pricing.data import catalogue
from pricing.data.items import REPEATED, Item, Skipped, items_from_rows, read_rows

# 66,778 PC parts scraped from PCPartPicker in July 2025 (MIT licence); about a quarter carry a price in range.
PC_PARTS_URL = (
    "https://raw.githubusercontent.com/docyx/pc-part-dataset/06ffc8eec068db5e8145e012ad2ec11e56a7c969/data/jsonl.zip"
)
PC_PARTS_SHA256 = "752916c6adfa56e903522acda11526802e88959ef0e13f295096e6bbd5c43137"
HUB_FILES = ["*.parquet", "*.jsonl", "*.csv"]


def pc_parts_rows(archive: Path):
    """(number, row) of each part, its fields written out as the description. An exact repetition of an earlier row is
    marked with REPEATED, so that it is counted and left out.

    `price_per_gb` gives the price away and is left out, as are fields that are null.
    """

    def words(value) -> str:
        if isinstance(value, list):
            return " / ".join(str(v) for v in value)
        return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)

    number, seen = 0, set()
    with zipfile.ZipFile(archive) as files:
        for name in sorted(n for n in files.namelist() if n.endswith(".jsonl")):
            category = Path(name).stem.replace("-", " ")
            for line in files.read(name).decode().splitlines():
                number += 1
                part = json.loads(line)
                title, price = part.pop("name"), part.pop("price")
                part.pop("price_per_gb", None)
                fields = [
                    f"{key.replace('_', ' ')}: {words(value)}" for key, value in part.items() if value is not None
                ]
                row = {"title": title, "category": category, "description": "; ".join(fields), "price": price}
                key = tuple(row.values())
                yield number, row | {REPEATED: key in seen and price is not None}
                seen.add(key)


def folder_rows(root: Path):
    """(number, row) of the data files below `root`. A name such as `train-00000-of-00002.parquet` puts rows without a
    split of their own into train."""
    number = 0
    for path in sorted(p for kind in ("parquet", "jsonl", "csv") for p in root.rglob(f"*.{kind}")):
        split = next((s for s in ("train", "val", "test") if path.stem.lower().startswith(s)), None)
        for _, row in read_rows(path):
            number += 1
            if isinstance(row, dict) and split and not row.get("split"):
                row = row | {"split": split}
            yield number, row


def load_items(data: str, size: int, seed: int, strict: bool = False) -> tuple[list[Item], Skipped, dict]:
    """The items, the rows left out, and the identity of the data for run.json (its name, and what changes with it:
    size and seed, sha256 or commit).

    `size` and `seed` are the catalogue's; `strict` as in items_from_rows. Raises ValueError or OSError, in one line.
    """
    path = Path(os.path.expanduser(data))
    made = []
    if data == "catalogue":
        made = catalogue.generate(size, seed)
        rows, identity = enumerate(made, 1), {"size": size, "seed": seed}
    elif data == "pc-parts":
        rows = pc_parts_rows(
            download(PC_PARTS_URL, PC_PARTS_SHA256, cache_directory() / f"pc-parts-{PC_PARTS_SHA256[:16]}.zip")
        )
        identity = {"sha256": PC_PARTS_SHA256}
        strict = False  # three quarters of the parts have no price; that is no damage
    elif path.is_file():
        rows = read_rows(path)
        identity = {"sha256": sha256(path)}
    elif data.count("/") == 1 and not path.suffix and not data.startswith((".", "~", "/")):
        root = snapshot(data, "data set", HUB_FILES)
        rows, identity = folder_rows(root), {"commit": root.name}  # the hub's cache names a snapshot by its commit
    else:
        raise ValueError(
            f"data file {data} does not exist; --data takes catalogue, pc-parts, a file or a hub data set org/name"
        )
    items, skipped = items_from_rows(rows, data, strict)
    if made:  # the catalogue alone knows the price without its noise
        items = [replace(item, fair_price=made[int(item.id) - 1]["fair_price"]) for item in items]
    return items, skipped, {"data": data, "items": len(items)} | identity
