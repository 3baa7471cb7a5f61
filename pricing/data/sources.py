"""What `--data` names: the built-in catalogue, pc-parts, the reference's own test, files, data sets of the hub.

Of several sources the first is what the run is about: it alone is validated and tested on. The others add rows to train
on, each under a tag that says where it comes from, since price levels differ from shop to shop (`Item.tagged`).
"""

import json
import os
import re
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

from common.hub import cache_directory, download, sha256, snapshot
from pricing.curation.leaks import near_pairs
from pricing.data import catalogue, reference
from pricing.data.items import REPEATED, SPLITS, Item, Skipped, items_from_rows, normalise_title, sample
from pricing.data.rows import ADVICE, is_empty, read_rows

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
            for line in files.read(name).decode().strip().split("\n"):
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


def split_of_path(path: Path) -> str | None:
    """train, val or test by the words in the names of a file (relative to the data set's folder) and of its folders,
    as the Hugging Face hub reads them: `test/part0.csv`, `x_test.csv`, `train-00000-of-00002.parquet`, but not
    `testimonials.csv`. A folder's name goes before the file's; None where no name, or more than one split, is named."""
    for name in (*reversed(path.parts[:-1]), path.stem):
        words = re.split(r"[\W\d_]+", name.lower())
        if splits := {SPLITS[word] for word in words if word in SPLITS}:
            return splits.pop() if len(splits) == 1 else None
    return None


def folder_rows(root: Path, name: str | None = None):
    """(number, row) of the data files below `root`. Rows without a split of their own are in the one that their file's
    name says. Raises ValueError, with the data set's `name`, where there are only files of other kinds."""
    files = sorted(p for kind in ("parquet", "jsonl", "csv") for p in root.rglob(f"*.{kind}"))
    if not files:
        other = next((kind for kind in ADVICE if any(root.rglob(f"*{kind}"))), ".json")
        raise ValueError(f"{name or root} has no .parquet, .jsonl or .csv file; of a {other} file{ADVICE[other]}")
    number = 0
    for path in files:
        split = split_of_path(path.relative_to(root))
        for _, row in read_rows(path):
            number += 1
            yield number, row | {"split": split} if split and is_empty(row.get("split")) else row


def load_items(
    data: str, size: int, seed: int, strict: bool = False, default_split: str | None = None
) -> tuple[list[Item], Skipped, dict]:
    """The items, the rows left out, and the identity of the data for run.json (its name, and what changes with it:
    size and seed, sha256 or commit).

    `size` and `seed` are the catalogue's; `strict` as in items_from_rows. `default_split`: of the rows of a file that
    have none, in place of their title's hash. Raises ValueError or OSError, in one line.
    """
    path = Path(os.path.expanduser(data))
    made, default_split = [], default_split if path.is_file() else None
    if data == "catalogue":
        made = catalogue.generate(size, seed)
        rows, identity = enumerate(made, 1), {"size": size, "seed": seed}
    elif data == "pc-parts":
        rows = pc_parts_rows(
            download(PC_PARTS_URL, PC_PARTS_SHA256, cache_directory() / f"pc-parts-{PC_PARTS_SHA256[:16]}.zip")
        )
        identity = {"sha256": PC_PARTS_SHA256}
        strict = False  # three quarters of the parts have no price; that is no damage
    elif tests := reference.test_count(data):
        rows, identity = reference.rows(tests), {"sha256": reference.SHA256}
        strict = False  # people's files repeat one another
    elif path.is_file():
        rows = read_rows(path)
        identity = {"sha256": sha256(path)}
    elif data.count("/") == 1 and not path.suffix and not data.startswith((".", "~", "/")):
        root = snapshot(data, "data set", HUB_FILES)
        # The hub's cache names a snapshot by its commit.
        rows, identity = folder_rows(root, f"data set {data}"), {"commit": root.name}
    else:
        raise ValueError(
            f"data file {data} does not exist; --data takes catalogue, pc-parts, reference, a file or a hub data set "
            "org/name"
        )
    items, skipped = items_from_rows(rows, data, strict, default_split)
    if made:  # the catalogue alone knows the price without its noise
        items = [replace(item, fair_price=made[int(item.id) - 1]["fair_price"]) for item in items]
    return items, skipped, {"data": data, "items": len(items)} | identity


@dataclass
class Loaded:
    """The items of all sources, and what is known of them."""

    items: list[Item]
    skipped: dict[str, Skipped]  # the rows left out, of each source
    identity: dict  # for run.json: a digest or a commit, by which a change is noticed
    near: int  # training items left out as near-duplicates of held-out ones


def load_sources(
    data: str | list[str], origins: list[str] | None = None, mix: list[float] | None = None, size: int = 3600,
    seed: int = 0, strict: bool = False,
) -> Loaded:  # fmt: skip
    """The items of one source or several. Of several, and where `origins` names it, each item has an origin: its row's
    own, else what `origins` says, else the source's name. `mix` are the sources' shares of the training items.

    Where rows have come together that nobody split (several sources, or the reference's), training items that are
    near-duplicates of held-out ones, or have their titles, are left out. Raises ValueError or OSError, in one line.
    """
    sources = [data] if isinstance(data, str) else data
    names = check_names(sources, origins)
    parts, skipped, identities = [], {}, []
    for number, (source, name) in enumerate(zip(sources, names, strict=True)):
        part, skipped[source], identity = load_items(source, size, seed, strict)
        if len(sources) > 1 or origins:
            part = [replace(item, origin=item.origin or name) for item in part]
        parts.append(part if number == 0 else [item for item in part if item.split == "train"])
        identities.append(identity)
    count = sum(map(len, parts))
    identity = identities[0] if len(sources) == 1 else {"data": data, "items": count, "sources": identities}
    if len(sources) > 1 or reference.test_count(sources[0]):
        parts = without_repeats(parts)
    near = count - sum(map(len, parts))
    if mix:
        parts = mixed(parts, mix)
    return Loaded([item for part in parts for item in part], skipped, identity, near)


def check_names(sources: list[str], origins: list[str] | None) -> list[str]:
    """What each source is called. Raises ValueError where two are called alike, or where `origins` are not as many."""
    if origins and len(origins) != len(sources):
        raise ValueError(f"--origin takes a name for each of the {len(sources)} sources of --data, got {len(origins)}")
    names = origins or [Path(name).stem if Path(name).expanduser().is_file() else name for name in sources]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"two sources of --data are called {twice[0]!r}: name them with --origin")
    return names


def without_repeats(parts: list[list[Item]]) -> list[list[Item]]:
    """Without the training items that have a held-out item's title or are near-duplicates of one (leaks.py)"""
    train = [item for part in parts for item in part if item.split == "train"]
    held_out = [item for item in parts[0] if item.split != "train"]
    titles = {normalise_title(item.title) for item in held_out}
    pairs = near_pairs((item.text for item in train), [item.text for item in held_out])
    repeats = {id(train[n]) for n, _ in pairs}
    repeats |= {id(item) for item in train if normalise_title(item.title) in titles}
    return [[item for item in part if id(item) not in repeats] for part in parts]


def mixed(parts: list[list[Item]], shares: list[float]) -> list[list[Item]]:
    """The first source's items, and of each other one so many that its training items have its share of all: a fixed
    sample, or every item as often as needed. Raises ValueError where a source has no training item."""
    size = sum(item.split == "train" for item in parts[0])
    chosen = [parts[0]]
    for number, (part, share) in enumerate(zip(parts[1:], shares[1:], strict=True), 2):
        if not part:
            raise ValueError(f"--mix: source {number} of --data has no item to train on")
        whole, rest = divmod(round(size * share / shares[0]), len(part))
        chosen.append(part * whole + sample(part, rest))
    return chosen
