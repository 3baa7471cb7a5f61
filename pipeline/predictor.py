"""From an opened model to prices: its distribution over whole dollars, its price head's quantiles, and what several
members make of both together.

    predictor = Predictor("out", device, dtype)
    prediction = predictor.predict(predictor.prompts(items))         prediction.quantiles("blend")

A prediction is kept as 21 quantiles of the log price (pricing.distribution.intervals.LEVELS). Predictions of one item,
by the digits and by the price head, or by several members of a run, are averaged quantile by quantile in log price.
"""

import argparse
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import numpy as np
import torch

from llama.attention import Layout
from llama.generate import extend, prefill, read_prefix
from llama.model import Llama
from lora.adapter import load_adapter
from lora.inject import lora_layers
from pipeline.checkpoint import (
    CALIBRATION,
    COMPLETE,
    TrainingRun,
    adapter_digest,
    member_paths,
    read_calibration,
    read_run,
)
from pipeline.data import encode_as_run, run_items
from pipeline.models import fast, load_base, open_base
from pricing.data.batch import length_batches
from pricing.data.items import Item, sample
from pricing.data.neighbours import INDEX, Index
from pricing.distribution.decode import PRUNE, PriceTree, price_distribution
from pricing.distribution.intervals import LEVELS, MIDDLE, in_dollars, log_quantiles
from pricing.distribution.quantile_head import FILE, PriceHead, load_head

MOST_CALIBRATION = 1000  # validation items that price ranges are calibrated on: then a share is right within 1.3 %


@dataclass
class Prediction:
    """What is thought of n items."""

    distribution: np.ndarray  # (n, 1000) P(price), mean over the members
    digits: np.ndarray  # (n, 21) its quantiles, log dollars
    head: np.ndarray | None = None  # (n, 21) the price head's, log dollars

    def quantiles(self, decode: str) -> np.ndarray:
        """(n, 21) log dollars: `head`, `blend` (half digits, half head), else the digits'."""
        if decode not in ("head", "blend"):
            return self.digits
        return self.head if decode == "head" else (self.digits + self.head) / 2

    def median(self, decode: str | None = None) -> np.ndarray:
        """The price of least expected absolute error of each item: by all there is, or by `decode`  # (n,) dollars"""
        decode = decode or ("median" if self.head is None else "blend")
        return in_dollars(self.quantiles(decode)[:, MIDDLE])


def forward_tokens(model: Llama, asked: int | None) -> int:
    """`--batch-tokens`, or what is fast where the model is"""
    return asked or (16384 if model.device.type == "cuda" else 2048)


@contextmanager
def without_adapter(model: Llama):
    """The base model, bit for bit, while this lasts: B = 0."""
    layers = lora_layers(model).values()
    trained = [layer.lora_B.detach().clone() for layer in layers]
    try:
        for layer in layers:
            layer.lora_B.data.zero_()
        yield
    finally:
        for layer, lora_B in zip(layers, trained, strict=True):
            layer.lora_B.data.copy_(lora_B)


@torch.no_grad()
def last_states(model: Llama, prompts: list[list[int]], batch_tokens: int | None) -> np.ndarray:
    """What the model's head reads at the last token of each prompt: (items, C) float32, in order; batched by length."""
    states = np.zeros((len(prompts), model.config.hidden_size), np.float32)
    for indices in length_batches(prompts, forward_tokens(model, batch_tokens)):
        part = [prompts[i] for i in indices]
        layout = Layout.packed([len(prompt) for prompt in part], model.device)
        tokens = torch.tensor([token for prompt in part for token in prompt], device=model.device)  # (N,)
        states[indices] = model.hidden_states(tokens, layout, at=layout.last).cpu().numpy()
    return states


def tree_functions(model: Llama, prompts: list[list[int]]) -> tuple[Callable, Callable]:
    """`prefill` and `extend` as pricing.distribution.decode wants them; what all `prompts` begin with is read once."""
    shared = 0
    if len(prompts) > 4:  # fewer are sooner read whole
        first, last = min(prompts), max(prompts)  # what these two share, all that lie between share too
        while shared < min(map(len, prompts)) - 1 and first[shared] == last[shared]:
            shared += 1
    prefix = read_prefix(model, prompts[0][:shared]) if shared else None

    def prefill_shared(part, choices):
        return prefill(model, [prompt[shared:] for prompt in part], choices.to(model.device), prefix)

    def extend_tree(cache, tokens, parents, choices):
        return extend(model, cache, tokens, parents, choices.to(model.device))

    return prefill_shared, extend_tree


def predict(
    model: Llama, tree: PriceTree, prompts: list[list[int]], price_head: PriceHead | None = None, *,
    batch_tokens: int | None = None, prune: float = PRUNE, on_batch=None,
) -> Prediction:  # fmt: skip
    """Of every prompt, in order; batched by length. `on_batch(indices, Prediction)` sees each batch as it comes."""
    size = len(prompts), len(LEVELS)
    result = Prediction(np.zeros((len(prompts), 1000)), np.zeros(size), np.zeros(size) if price_head else None)
    read, grow = tree_functions(model, prompts)
    for indices in length_batches(prompts, forward_tokens(model, batch_tokens)):
        caches = []

        def read_and_keep(*args):
            caches.append(read(*args))
            return caches[-1]

        p, _ = price_distribution(read_and_keep, grow, [prompts[i] for i in indices], tree, prune)
        part = Prediction(p, log_quantiles(p))
        result.distribution[indices], result.digits[indices] = part.distribution, part.digits
        if price_head:
            part.head = result.head[indices] = price_head.quantiles(caches[0][2].states.cpu().numpy())
        if on_batch:
            on_batch(indices, part)
    return result


def mean_of(weighted: list[tuple[Prediction, int]], indices=slice(None)) -> Prediction:
    """The mean of predictions, each with its weight; of the first, only the rows `indices`"""
    (first, weight), (second, other) = weighted

    def mean(a, b):
        return None if a is None else (weight * a[indices] + other * b) / (weight + other)

    return Prediction(*(mean(getattr(first, k), getattr(second, k)) for k in ("distribution", "digits", "head")))


def validate(run: TrainingRun, items: list[Item], tokenizer, tree: PriceTree) -> tuple[float, dict[str, np.ndarray]]:
    """Dollars of mean absolute error on `items` with the weights of now, and the predictions as calibration arrays"""
    prompts = [example.prompt for example in run.data.encode(items, tokenizer, run.args)]
    price = np.array([item.price for item in items])
    run.model.eval()
    prediction = predict(run.model, tree, prompts, run.price_head, batch_tokens=run.args.batch_tokens)
    run.model.train()
    heads = {} if prediction.head is None else {"head": prediction.head}
    return float(np.abs(prediction.median() - price).mean()), {"price": price, "digits": prediction.digits} | heads


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


class Predictor:
    """A run of train.py, opened to price with: one base model, and the adapters and price heads of all its members.

    Raises ValueError where it is none, is incomplete, or its members do not belong together.
    """

    def __init__(self, ckpt: str | Path, device: torch.device, dtype: torch.dtype):
        self.record = read_run(ckpt)
        self.options = self.record["options"]
        self.paths = member_paths(ckpt, self.options)
        for path in self.paths[1:]:
            other, same = read_run(path), ("base_model", "prompt", "data", "compute_dtype")
            if any(other.get(key) != self.record.get(key) for key in same):
                raise ValueError(f"{path} was not trained as {ckpt} was: they are not members of one run")
        self.heads = self._open_heads()
        if (Path(ckpt) / "state").is_dir() and not (Path(ckpt) / COMPLETE).is_file():
            steps = f"saved at step {self.record['steps']:,} of a run that has not come to its end"
            print(f"{ckpt} was {steps}: train.py --resume --out {ckpt}", file=sys.stderr)
        self.model, self.tokenizer = self._open_model(device, dtype)
        self.heads = [head and head.to(device) for head in self.heads]
        self.active = 0  # the member whose adapter is in the model
        self.tree = PriceTree.build(self.tokenizer.encode_answer)
        self.index = Index.load(Path(ckpt) / INDEX) if self.options["neighbours"] else None

    def _open_heads(self) -> list[PriceHead | None]:
        heads = [open_head(path) if (path / FILE).is_file() else None for path in self.paths]
        without = [path for path, head in zip(self.paths, heads, strict=True) if head is None]
        if without and (self.options["head"] == "quantile" or len(without) < len(self.paths)):
            raise ValueError(f"{without[0] / FILE} is missing: the run, or another member of it, has a price head")
        return heads

    def _open_model(self, device: torch.device, dtype: torch.dtype) -> tuple:
        options, numerics = self.options, self.record.get("plan", {})
        config, tokenizer, directory = open_base(options["model"])
        # What was trained beside an lm_head in 8 bits is priced beside it.
        head8 = numerics.get("head8", False)
        model = load_base(config, directory, device, dtype, argparse.Namespace(**options), head8)
        load_adapter(model, self.paths[0])
        if fast:
            fast.install(model, fast.plan_pricing(model, options["bits"]))
        return model.eval(), tokenizer

    def decoding(self, asked: str | None) -> str:
        """What is asked for, or what has the least error in dollars. Raises ValueError where it needs a price head."""
        if asked in ("head", "blend") and self.heads[0] is None:
            raise ValueError(f"{self.paths[0]} has no price head; train with --head quantile, or leave out --decode")
        return asked or ("median" if self.heads[0] is None else "blend")

    def prompts(self, items: list[Item]) -> list[list[int]]:
        """As the run reads them. Says on standard error how many texts are too long for it."""
        examples = encode_as_run(items, self.tokenizer, self.options, self.record["prompt"], self.index)
        if cut := sum(example.cut for example in examples):
            limit = f"the run's --max-tokens {self.options['max_tokens']}"
            print(f"{cut:,} of {len(items):,} texts are longer than {limit} and were cut", file=sys.stderr)
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
            is_last = number == len(self.paths) - 1

            def pass_on(indices, part, earlier=total, number=number):
                on_batch(indices, part if earlier is None else mean_of([(earlier, number), (part, 1)], indices))

            options = dict(batch_tokens=batch_tokens, prune=prune, on_batch=pass_on if is_last and on_batch else None)
            part = predict(self.model, self.tree, prompts, head, **options)
            total = part if total is None else mean_of([(total, number), (part, 1)])
        return total

    def calibration(self, decode: str) -> tuple[np.ndarray, np.ndarray]:
        """Predictions (m, 21) of the run's validation items, as train.py left them, and their prices (m,) dollars"""
        parts = [read_calibration(path) for path in self.paths]
        if any(not np.array_equal(part["price"], parts[0]["price"]) for part in parts):
            raise ValueError(f"the members of {self.paths[0]} were calibrated on different validation items")
        price, kinds = parts[0]["price"], {"head": ["head"], "blend": ["digits", "head"]}.get(decode, ["digits"])
        if not len(price):
            return np.zeros((0, len(LEVELS))), price
        if missing := [path for path, part in zip(self.paths, parts, strict=True) if not set(kinds) <= set(part)]:
            raise ValueError(f"{missing[0] / CALIBRATION} lacks what ranges of {decode} are calibrated by; train again")
        return np.mean([part[kind] for part in parts for kind in kinds], axis=0), price


def test_prompts(predictor: Predictor, count: int | None = None) -> list[list[int]]:
    """The prompts of a run's own test items, or of a fixed sample of so many"""
    items = [item for item in run_items(predictor.record) if item.split == "test"]
    return predictor.prompts(sample(items, count))
