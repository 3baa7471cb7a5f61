"""A run of train.py, opened to price with.

    predictor = Predictor("out", device, dtype)
    prediction = predictor.predict(predictor.prompts(items))         prediction.quantiles("blend")

One base model, and the adapters and price heads of all the run's members, whose predictions are averaged.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

from common.manifest import read_whole, seal_of
from lora.adapter import load_adapter
from pipeline.base_digest import check_base
from pipeline.checkpoint import (
    CALIBRATION,
    adapter_digest,
    is_complete,
    member_paths,
    open_run,
    read_calibration,
    read_run,
)
from pipeline.models import fast, load_base, open_base
from pipeline.prediction import Prediction, mean_of, predict
from pricing.data.items import Item
from pricing.data.prompt import describe_cuts, encode_items
from pricing.distribution.decode import PRUNE, PriceTree
from pricing.distribution.intervals import LEVELS
from pricing.distribution.quantile_head import FILE, PriceHead, load_head

MOST_CALIBRATION = 1000  # validation items that price ranges are calibrated on: then a share is right within 1.3 %


def open_head(ckpt: str | Path) -> PriceHead:
    """The price head of a checkpoint. Raises ValueError where there is none, or where it was trained beside other
    weights."""
    head = load_head(ckpt)
    if head.settings.get("adapter") != adapter_digest(ckpt):
        raise ValueError(
            f"the price head in {ckpt} was trained on the states of another adapter: one of {FILE} and "
            "adapter_model.safetensors is damaged or of another run; train again"
        )
    return head


def origin_of(run: dict, name: str | None) -> str:
    """The tag of new items: `name`, else that of the run's own held-out items; "" for a run that has no tags. Raises
    ValueError for a name that the run does not know."""
    origins = run.get("origins", [""])
    if name is not None and name not in origins:
        known = ", ".join(map(repr, filter(None, origins))) or "none"
        raise ValueError(f"--origin {name!r}: the run was trained on items of other origins: {known}")
    return origins[0] if name is None else name


class Predictor:
    """A run of train.py, opened to price with: one base model, and the adapters and price heads of all its members.

    `origin` is the tag of the items to be priced, where it has tags. Raises ValueError where it is no run, is
    incomplete, does not know the origin, or its members do not belong together.
    """

    def __init__(self, ckpt: str | Path, device: torch.device, dtype: torch.dtype, origin: str | None = None):
        self.model, self.asked_origin = None, origin
        read_run(ckpt)  # says best what is no run at all
        read_whole(ckpt, lambda: self._open(ckpt, device, dtype))
        self.active = 0  # the member whose adapter is in the model
        self.tree = PriceTree.build(self.tokenizer.encode_answer)

    def _open(self, ckpt: str | Path, device: torch.device, dtype: torch.dtype) -> None:
        """All that is read of the run, but for its further members' adapters"""
        base = self.model and self.record["options"]
        self.record = read_run(ckpt)
        self.options, self.origin = self.record["options"], origin_of(self.record, self.asked_origin)
        self.paths = member_paths(ckpt, self.options)
        for path in self.paths[1:]:
            other, same = open_run(path), ("base_model", "prompt", "data", "compute_dtype")
            if any(other.get(key) != self.record.get(key) for key in same):
                raise ValueError(f"{path} was not trained as {ckpt} was: they are not members of one run")
        heads = self._open_heads()
        self.seals, self.calibrations = list(map(seal_of, self.paths)), list(map(read_calibration, self.paths))
        if (Path(ckpt) / "state").is_dir() and not is_complete(ckpt):
            steps = f"saved at step {self.record['steps']:,} of a run that has not come to its end"
            print(f"{ckpt} was {steps}: train.py --resume --out {ckpt}", file=sys.stderr)
        if base != self.options:  # it is not being read again
            self.model, self.tokenizer = self._open_model(device, dtype)
        else:
            load_adapter(self.model, self.paths[0])
        self.heads = [head and head.to(device) for head in heads]

    def _open_heads(self) -> list[PriceHead | None]:
        heads = [open_head(path) if (path / FILE).is_file() else None for path in self.paths]
        without = [path for path, head in zip(self.paths, heads, strict=True) if head is None]
        if without and (self.options["head"] == "quantile" or len(without) < len(self.paths)):
            raise ValueError(f"{without[0] / FILE} is missing: the run, or another member of it, has a price head")
        return heads

    def _open_model(self, device: torch.device, dtype: torch.dtype) -> tuple:
        options, numerics = self.options, self.record.get("plan", {})
        config, tokenizer, directory = open_base(options["model"])
        check_base(self.record, directory, self.paths[0])
        # What was trained beside an lm_head in 8 bits is priced beside it.
        head8 = numerics.get("head8", False)
        model = load_base(config, directory, device, dtype, argparse.Namespace(**options), head8)
        load_adapter(model, self.paths[0])
        if fast:
            path = fast.install(model, fast.plan_pricing(model, options["bits"]))
            if "(no " in path:
                print(f"{path}: pricing is slower without it", file=sys.stderr)
        return model.eval(), tokenizer

    def decoding(self, asked: str | None) -> str:
        """What is asked for, or what has the least error in dollars. Raises ValueError where it needs a price head."""
        if asked in ("head", "blend") and self.heads[0] is None:
            raise ValueError(f"{self.paths[0]} has no price head; train with --head quantile, or leave out --decode")
        return asked or ("median" if self.heads[0] is None else "blend")

    def prompts(self, items: list[Item]) -> list[list[int]]:
        """As the run reads them. Says on standard error how many texts are too long for it."""
        limit = self.options["max_tokens"]
        examples = encode_items(items, self.tokenizer, limit, self.record["prompt"])
        if cuts := describe_cuts(examples, limit):
            print(f"{cuts} (the run's limit)", file=sys.stderr)
        return [example.prompt for example in examples]

    def predict(
        self, prompts: list[list[int]], batch_tokens: int | None = None, prune: float = PRUNE, on_batch=None
    ) -> Prediction:
        """The mean over the members; `on_batch(indices, Prediction)` as it becomes known."""
        total = None
        for number, (path, head) in enumerate(zip(self.paths, self.heads, strict=True)):
            if number != self.active:
                load_adapter(self.model, path)
                self.active = number
                if seal_of(path) != self.seals[number]:
                    raise ValueError(f"{path} was saved again while it was being priced with; start again")
            is_last = number == len(self.paths) - 1

            def pass_on(indices, part, earlier=total, number=number):
                on_batch(indices, part if earlier is None else mean_of([(earlier, number), (part, 1)], indices))

            options = dict(batch_tokens=batch_tokens, prune=prune, on_batch=pass_on if is_last and on_batch else None)
            part = predict(self.model, self.tree, prompts, head, **options)
            total = part if total is None else mean_of([(total, number), (part, 1)])
        return total

    def calibration(self, decode: str) -> tuple[np.ndarray, np.ndarray]:
        """Predictions (m, 21) of the run's validation items, as train.py left them, and their prices (m,) dollars"""
        parts = self.calibrations
        if any(not np.array_equal(part["price"], parts[0]["price"]) for part in parts):
            raise ValueError(f"the members of {self.paths[0]} were calibrated on different validation items")
        price, kinds = parts[0]["price"], {"head": ["head"], "blend": ["digits", "head"]}.get(decode, ["digits"])
        if not len(price):
            return np.zeros((0, len(LEVELS))), price
        if missing := [path for path, part in zip(self.paths, parts, strict=True) if not set(kinds) <= set(part)]:
            raise ValueError(f"{missing[0] / CALIBRATION} lacks what ranges of {decode} are calibrated by; train again")
        return np.mean([part[kind] for part in parts for kind in kinds], axis=0), price
