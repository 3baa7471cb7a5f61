"""The items of a run: what it learns from, what it is validated on, and what it must never see again.

A run's data are known by a digest in run.json: where they have changed since, its splits cannot be trusted.
"""

import argparse
from dataclasses import dataclass

from pricing.data.items import Item, Skipped, sample, unseen
from pricing.data.neighbours import Index, build, with_neighbours
from pricing.data.prompt import Example, encode_items, load_prompt
from pricing.data.sources import load_items


@dataclass
class TrainingData:
    items: int  # of all splits
    train: list[Item]
    val: list[Item]  # priced at each check
    all_val: list[Item]  # none of which is trained on
    tests: int  # items in the test split
    skipped: Skipped
    identity: dict  # for run.json
    prompt: str
    index: Index | None  # of the training items, with --neighbours

    def describe(self, name: str) -> str:
        """What is known of the data, a line or two"""
        text = f"data       {name}: {self.items:,} items, {len(self.train):,} to train on"
        text += f"; left out: {self.skipped}" if self.skipped.counts else ""
        if not self.tests:
            text = f"data       {name}: no item is in the test split; evaluate.py will have nothing to price\n{text}"
        return text

    def encode(self, items: list[Item], tokenizer, options: argparse.Namespace) -> list[Example]:
        return encode_as_run(items, tokenizer, vars(options), self.prompt, self.index)


def load_training_data(args: argparse.Namespace, earlier: dict | None) -> TrainingData:
    """What `args` name. `earlier`: run.json of the run that --resume goes on with.

    Raises ValueError for data without training items, without the validation items that the options need, or that
    have changed since the earlier run.
    """
    items, skipped, identity = load_items(args.data, args.size, args.data_seed, args.strict)
    train = sample([item for item in items if item.split == "train"], args.train_items)
    all_val = unseen([item for item in items if item.split == "val"], train)
    val = sample(all_val, args.val_items)
    prompt = earlier["prompt"] if earlier else load_prompt(args.prompt)
    if earlier:
        check_same_data(earlier, identity)
    if not train:
        raise ValueError(f"{args.data}: none of the {len(items)} items is in the train split")
    if not val and (args.keep == "best" or args.patience):
        raise ValueError(f"{args.data}: no new item is in the val split, by which --keep best and --patience go")
    tests = sum(item.split == "test" for item in items)
    index = build(train) if args.neighbours else None
    return TrainingData(len(items), train, val, all_val, tests, skipped, identity, prompt, index)


def encode_as_run(items: list[Item], tokenizer, options: dict, prompt: str, index: Index | None) -> list[Example]:
    """Items as a run reads them: its prompt, its token limit, its neighbours"""
    templates = with_neighbours(items, prompt, index, options["neighbours"])
    return encode_items(items, tokenizer, options["max_tokens"], templates)


def check_same_data(run: dict, identity: dict) -> None:
    """Raises ValueError where the data are no longer those of the run: what it held out would be unknown."""
    if any(identity.get(key) != run["data"].get(key) for key in ("sha256", "items", "commit")):
        raise ValueError(
            f"{identity['data']} has changed since the run was trained on it: its splits cannot be trusted"
        )


def run_items(run: dict) -> list[Item]:
    """All items of a run's data. Raises ValueError where they have changed."""
    options = run["options"]
    items, _, identity = load_items(options["data"], options["size"], options["data_seed"], options["strict"])
    check_same_data(run, identity)
    return items
