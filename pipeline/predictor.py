"""From an opened model to prices: its distribution over whole dollars, its head's quantiles, and what several runs make
of both together.

    run = Run("out", device, dtype)
    forecast = run.forecast(run.prompts(items))          forecast.quantiles("blend")          run.held("blend")

A forecast is kept as 21 quantiles of the log price (pricing.intervals.LEVELS). Forecasts of one item, by the digits and
by the head, or by several members of a run, are averaged quantile by quantile in log price.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from common.files import whole_file
from llama.model import Llama
from lora.adapter import load_adapter
from pipeline.models import load_run, read_run, run_items
from pipeline.states import READ, adapter_digest, forward_tokens, head_states
from pricing.data.batch import length_batches
from pricing.data.items import Item, sample
from pricing.data.neighbours import INDEX, Index, with_neighbours
from pricing.data.prompt import Example, encode_items
from pricing.distribution.decode import PRUNE, PriceTree, price_distribution
from pricing.distribution.intervals import LEVELS, MIDDLE, in_dollars, log_quantiles
from pricing.distribution.quantile_head import FILE, PriceHead, load_head

COMPLETE = "state/complete"  # a file in a checkpoint whose run has come to its end: nothing is left to resume
HELD = "validation.safetensors"  # a run's own forecasts of its validation items
MOST_HELD = 1000  # validation items that price ranges are calibrated on: then a share is right within 1.3 %


@dataclass
class Forecast:
    """What is thought of n items."""

    distribution: np.ndarray  # (n, 1000) P(price), mean over the members
    digits: np.ndarray  # (n, 21) its quantiles, log dollars
    head: np.ndarray | None = None  # (n, 21) the head's, log dollars

    def quantiles(self, decode: str) -> np.ndarray:
        """(n, 21) log dollars: `head`, `blend` (half digits, half head), else the digits'."""
        if decode not in ("head", "blend"):
            return self.digits
        return self.head if decode == "head" else (self.digits + self.head) / 2

    def median(self, decode: str | None = None) -> np.ndarray:
        """The price of least expected absolute error of each item: by all there is, or by `decode`  # (n,) dollars"""
        decode = decode or ("median" if self.head is None else "blend")
        return in_dollars(self.quantiles(decode)[:, MIDDLE])


def tree_functions(model: Llama, prompts: list[list[int]]) -> tuple[Callable, Callable]:
    """`prefill` and `extend` for pricing.decode, for any of `prompts`: what all begin with is read once, here."""
    shared = 0
    if len(prompts) > 4:  # fewer are sooner read whole
        first, last = min(prompts), max(prompts)  # what these two share, all that lie between share too
        while shared < min(map(len, prompts)) - 1 and first[shared] == last[shared]:
            shared += 1
    prefix = model.read_prefix(prompts[0][:shared]) if shared else None

    def prefill(part, choices):
        return model.prefill([prompt[shared:] for prompt in part], choices.to(model.device), prefix)

    def extend(cache, tokens, parents, choices):
        return model.extend(cache, tokens, parents, choices.to(model.device))

    return prefill, extend


def forecast(
    model: Llama, tree: PriceTree, prompts: list[list[int]], head: PriceHead | None = None, *,
    batch_tokens: int | None = None, prune: float = PRUNE, on_batch=None,
) -> Forecast:  # fmt: skip
    """Of every prompt, in order; batched by length. `on_batch(indices, Forecast)` sees each batch as it comes."""
    size = len(prompts), len(LEVELS)
    found = Forecast(np.zeros((len(prompts), 1000)), np.zeros(size), None if head is None else np.zeros(size))
    prefill, extend = tree_functions(model, prompts)
    last_only = head is not None and head.settings["states"] == "tuned" and not head.settings["mean"]
    last_only = last_only and head.settings["blocks"] == [len(model.layers)]
    states = None if head is None or last_only else head_states(model, prompts, head.settings, batch_tokens)
    for indices in length_batches(prompts, forward_tokens(model, batch_tokens)):
        caches = []

        def keeping(*args):
            caches.append(prefill(*args))
            return caches[-1]

        p, _ = price_distribution(keeping, extend, [prompts[i] for i in indices], tree, prune)
        found.distribution[indices], found.digits[indices] = p, log_quantiles(p)
        if head is not None:
            read = caches[0][2].states.cpu().numpy() if states is None else states[indices]
            found.head[indices] = head.quantiles(read)
        if on_batch:
            on_batch(indices, Forecast(p, found.digits[indices], None if head is None else found.head[indices]))
    return found


def members(ckpt: str | Path, options: dict) -> list[Path]:
    """The checkpoints of a run: itself, and the further ones that `train.py --members` trained. Raises ValueError where
    some are missing."""
    found, number = [Path(ckpt)], 1
    while (path := Path(ckpt) / "members" / str(number)).is_dir():
        found, number = [*found, path], number + 1
    if len(found) != (asked := options["members"]):
        raise ValueError(f"{ckpt} holds {len(found)} of its {asked} members; go on with train.py --resume --out {ckpt}")
    return found


class Run:
    """A run of train.py, opened to price with: one base model, and the adapters and heads of all its members.

    Raises ValueError where it is none, is incomplete, or its members do not belong together.
    """

    def __init__(self, ckpt: str | Path, device: torch.device, dtype: torch.dtype):
        self.about = read_run(ckpt)
        self.options = self.about["options"]
        self.paths = members(ckpt, self.options)
        for path in self.paths[1:]:
            other = read_run(path)
            if any(other.get(key) != self.about.get(key) for key in ("base_model", "prompt", "data", "compute_dtype")):
                raise ValueError(f"{path} was not trained as {ckpt} was: they are not members of one run")
        self.heads = [open_head(path) if (path / FILE).is_file() else None for path in self.paths]
        without = [path for path, head in zip(self.paths, self.heads, strict=True) if head is None]
        if without and (self.options["head"] == "quantile" or len(without) < len(self.paths)):
            raise ValueError(f"{without[0] / FILE} is missing: the run, or another member of it, has a head")
        kinds = [[head and head.settings.get(key) for key in ("joint", *READ)] for head in self.heads]
        if others := [path for path, kind in zip(self.paths, kinds, strict=True) if kind != kinds[0]]:
            raise ValueError(
                f"the heads of {ckpt} and of {others[0]} are of two kinds; train both anew with "
                f"`python -m pricing.head --ckpt {ckpt}`"
            )
        if (Path(ckpt) / "state").is_dir() and not (Path(ckpt) / COMPLETE).is_file():
            steps = f"saved at step {self.about['steps']:,} of a run that has not come to its end"
            print(f"{ckpt} was {steps}: train.py --resume --out {ckpt}", file=sys.stderr)
        self.model, self.tokenizer = load_run(ckpt, self.about, device, dtype)
        self.heads = [head and head.to(device) for head in self.heads]
        self.at = 0  # the member whose adapter is in the model
        self.tree = PriceTree.build(self.tokenizer.encode_answer)
        self.index = Index.load(Path(ckpt) / INDEX) if self.options["neighbours"] else None

    def decoding(self, asked: str | None) -> str:
        """What is asked for, or what has the least error in dollars. Raises ValueError where it needs a head."""
        if asked in ("head", "blend") and self.heads[0] is None:
            ckpt = self.paths[0]
            raise ValueError(f"{ckpt} has no head; train one with `python -m pricing.head --ckpt {ckpt}`")
        return asked or ("median" if self.heads[0] is None else "blend")

    def prompts(self, items: list[Item]) -> list[list[int]]:
        """As the run reads them. Says on standard error how many texts are too long for it."""
        examples = encode_run(items, self.tokenizer, self.options, self.about["prompt"], self.index)
        if cut := sum(example.cut for example in examples):
            limit = f"the run's --max-tokens {self.options['max_tokens']}"
            print(f"{cut:,} of {len(items):,} texts are longer than {limit} and were cut", file=sys.stderr)
        return [example.prompt for example in examples]

    def forecast(
        self, prompts: list[list[int]], batch_tokens: int | None = None, prune: float = PRUNE, on_batch=None
    ) -> Forecast:
        """The mean over the members; `on_batch(indices, Forecast)` as it becomes known."""
        total = None
        for number, (path, head) in enumerate(zip(self.paths, self.heads, strict=True)):
            if number != self.at:
                load_adapter(self.model, path)
                self.at = number
            is_last = number == len(self.paths) - 1

            def seen(indices, part, earlier=total):
                on_batch(indices, part if earlier is None else mean_of([(earlier, number), (part, 1)], indices))

            found = forecast(
                self.model, self.tree, prompts, head, batch_tokens=batch_tokens, prune=prune,
                on_batch=seen if is_last and on_batch else None,
            )  # fmt: skip
            total = found if total is None else mean_of([(total, number), (found, 1)])
        return total

    def held(self, decode: str) -> tuple[np.ndarray, np.ndarray]:
        """Forecasts (m, 21) of the run's validation items, as train.py left them, and their prices (m,) dollars"""
        parts = [read_held(path) for path in self.paths]
        if any(not np.array_equal(part["price"], parts[0]["price"]) for part in parts):
            raise ValueError(f"the members of {self.paths[0]} were calibrated on different validation items")
        price, kinds = parts[0]["price"], {"head": ["head"], "blend": ["digits", "head"]}.get(decode, ["digits"])
        if not len(price):
            return np.zeros((0, len(LEVELS))), price
        if missing := [path for path, part in zip(self.paths, parts, strict=True) if not set(kinds) <= set(part)]:
            raise ValueError(
                f"{missing[0] / HELD} lacks what ranges of {decode} are calibrated by; train the head anew with "
                f"`python -m pricing.head --ckpt {self.paths[0]}`"
            )
        return np.mean([part[kind] for part in parts for kind in kinds], axis=0), price


def mean_of(weighted: list[tuple[Forecast, int]], indices=slice(None)) -> Forecast:
    """The mean of forecasts, each with its weight; of the first, only the rows `indices`"""
    (first, weight), (second, other) = weighted

    def mean(a, b):
        return None if a is None else (weight * a[indices] + other * b) / (weight + other)

    return Forecast(*(mean(getattr(first, k), getattr(second, k)) for k in ("distribution", "digits", "head")))


def encode_run(items: list[Item], tokenizer, options: dict, prompt: str, index: Index | None) -> list[Example]:
    """Items as a run reads them: its template, its token limit, its neighbours"""
    templates = with_neighbours(items, prompt, index, options["neighbours"])
    return encode_items(items, tokenizer, options["max_tokens"], templates)


def write_held(ckpt: str | Path, found: dict[str, np.ndarray]) -> None:
    """`price` (m,) dollars, `digits` and `head` (m, 21) log dollars; whole or not at all"""
    with whole_file(Path(ckpt) / HELD) as part:
        save_file({key: np.ascontiguousarray(value, np.float64) for key, value in found.items()}, part)


def read_held(ckpt: str | Path) -> dict[str, np.ndarray]:
    """Raises ValueError where a run has none or the file is damaged."""
    path = Path(ckpt) / HELD
    if not path.is_file():  # trained without validation items
        return {"price": np.zeros(0)}
    try:
        found = load_file(path)
        sizes = {key: (len(found["price"]), len(LEVELS)) for key in found} | {"price": found["price"].shape[:1]}
        if wrong := [key for key, value in found.items() if value.shape != sizes[key]]:
            raise ValueError(f"{wrong[0]} is {found[wrong[0]].shape}")
        return found
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {' '.join(str(error).split())[:200]}") from None


def test_prompts(run: Run, count: int | None = None) -> list[list[int]]:
    """The prompts of a run's own test items, or of a fixed sample of so many"""
    return run.prompts(sample([item for item in run_items(run.about) if item.split == "test"], count))


def open_head(ckpt: str | Path) -> PriceHead:
    """The head of a checkpoint. Raises ValueError where there is none, or where it was trained beside other weights."""
    head = load_head(ckpt)
    if head.settings.get("adapter") != adapter_digest(ckpt):
        raise ValueError(
            f"the head in {ckpt} was trained on the states of another adapter; "
            f"train it anew with `python -m pricing.head --ckpt {ckpt}`, unless adapter_model.safetensors is damaged"
        )
    return head
