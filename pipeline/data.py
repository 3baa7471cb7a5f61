"""The items of a run: what it learns from, what it is validated on, and what it must never see again.

A run's data are known by a digest in run.json: where they have changed since, its splits cannot be trusted.
"""

import argparse
from collections import Counter
from dataclasses import dataclass

from common.screen import visible
from pricing.data.items import Item, Skipped, sample, unseen
from pricing.data.prompt import Example, encode_items, load_prompt
from pricing.data.sources import Loaded, load_sources

LEAST, LONGEST = 176, 384  # tokens of a prompt at most, where --max-tokens does not say: by the data, between these


@dataclass
class TrainingData:
    items: int  # of all splits
    train: list[Item]
    val: list[Item]  # priced at each check
    all_val: list[Item]  # none of which is trained on
    tests: int  # items in the test split
    skipped: dict[str, Skipped]  # of each source
    near: int  # training items left out as near-duplicates of held-out ones
    identity: dict  # for run.json
    prompt: str
    origins: list[str]  # tags that the training items have, the commonest of the held-out items' first

    def describe(self) -> str:
        """What is known of the data, a line or more"""
        name = " + ".join(self.skipped)
        lines = [f"data       {name}: {self.items:,} items, {len(self.train):,} to train on, {self.tests:,} to test"]
        lines += [f"data       {source}: left out: {rows}" for source, rows in self.skipped.items() if rows.counts]
        if self.near:
            lines.append(f"data       {self.near:,} training items left out: they repeat a held-out item, or nearly")
        if any(self.origins):
            counts = Counter(item.origin for item in self.train)
            lines.append("origins    " + ", ".join(f"{name} {counts[name]:,}" for name in self.origins))
        if not self.tests:
            lines.append(f"data       {name}: no item is in the test split; evaluate.py will have nothing to price")
        return visible("\n".join(lines))

    def encode(self, items: list[Item], tokenizer, options: argparse.Namespace) -> list[Example]:
        """Items as the run reads them: its prompt, its token limit. Where no limit is given, the first call, with the
        training items, sets it: to the longest of them, from LEAST to LONGEST, and what --batch-tokens has room for."""
        if options.max_tokens is None:
            limit = min(LONGEST, options.batch_tokens - 6)  # an answer has at most 6 tokens
            examples = encode_items(items, tokenizer, limit, self.prompt)
            longest = max(len(example.prompt) for example in examples)
            options.max_tokens = min(limit, max(LEAST, longest))
            return examples
        return encode_items(items, tokenizer, options.max_tokens, self.prompt)


def load_training_data(args: argparse.Namespace, earlier: dict | None, started_from: dict | None) -> TrainingData:
    """What `args` name. `earlier`: run.json of the run that --resume goes on with; `started_from`: of --start-from.

    Raises ValueError for data without training items, without the validation items that the options need, or that
    have changed since the earlier run.
    """
    loaded = sources_of(vars(args))
    items, train = loaded.items, training_items(loaded.items, vars(args))
    all_val = unseen([item for item in items if item.split == "val"], train + trained_on(started_from))
    val = sample(all_val, args.val_items)
    prompt = earlier["prompt"] if earlier else load_prompt(args.prompt)
    if earlier:
        check_same_data(earlier, loaded.identity)
    name = " + ".join(loaded.skipped)
    if not train:
        raise ValueError(f"{name}: none of the {len(items)} items is in the train split")
    if not val and (args.keep == "best" or args.patience):
        raise ValueError(f"{name}: no new item is in the val split, by which --keep best and --patience go")
    held_out = Counter(item.origin for item in items if item.split != "train")
    origins = Counter(item.origin for item in train)
    origins = sorted(origins, key=lambda origin: (-held_out[origin], -origins[origin], origin))
    tests = sum(item.split == "test" for item in items)
    return TrainingData(
        len(items), train, val, all_val, tests, loaded.skipped, loaded.near, loaded.identity, prompt, origins
    )


def sources_of(options: dict) -> Loaded:
    """What a run's options name"""
    names = ("data", "origin", "mix", "size", "data_seed", "strict")
    return load_sources(*(options[name] for name in names))


def sources(options: dict) -> list[str]:
    """The names of a run's sources; the first is what it is about"""
    return [options["data"]] if isinstance(options["data"], str) else options["data"]


def training_items(items: list[Item], options: dict) -> list[Item]:
    """What a run learns from"""
    return sample([item for item in items if item.split == "train"], options["train_items"])


def check_same_data(run: dict, identity: dict) -> None:
    """Raises ValueError where the data are no longer those of the run: what it held out would be unknown."""
    if any(identity.get(key) != run["data"].get(key) for key in ("sha256", "items", "commit", "sources")):
        raise ValueError(
            f"{identity['data']} has changed since the run was trained on it: its splits cannot be trusted"
        )


def run_items(run: dict) -> list[Item]:
    """All items of a run's data. Raises ValueError where they have changed."""
    loaded = sources_of(run["options"])
    check_same_data(run, loaded.identity)
    return loaded.items


def trained_on(run: dict | None) -> list[Item]:
    """What a run, and those that it started from, learnt from: never to be priced. Raises ValueError where the data of
    one of them have changed."""
    if not run:
        return []
    return training_items(run_items(run), run["options"]) + trained_on(run.get("started_from"))
