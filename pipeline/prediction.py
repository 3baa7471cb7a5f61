"""Predictions of an opened model: its distribution over whole dollars, and its price head's quantiles.

A prediction is kept as 21 quantiles of the log price (pricing.distribution.intervals.LEVELS). Predictions of one item,
by the digits and by the price head, or by several members of a run, are averaged quantile by quantile in log price.
"""

from contextlib import contextmanager
from dataclasses import dataclass
from typing import Callable

import numpy as np
import torch

from llama.attention import Layout
from llama.generate import extend, prefill, read_prefix
from llama.model import Llama
from lora.inject import lora_layers
from pipeline.checkpoint import TrainingRun
from pricing.data.batch import length_batches
from pricing.data.items import Item
from pricing.data.prompt import Example
from pricing.distribution.decode import PRUNE, PriceTree, price_distribution
from pricing.distribution.intervals import LEVELS, MIDDLE, in_dollars, log_quantiles
from pricing.distribution.quantile_head import PriceHead, new_price_head

SIZED = 64  # prompts at most whose states say how large what a price head reads is


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


def start_price_head(model: Llama, examples: list[Example], batch_tokens: int) -> PriceHead:
    """A price head to be trained with the adapter, for the last token's state. The states of some prompts tell how
    large what it reads is; the last norm's weights do not (in Gemma they are 54, the states 3.5)."""
    states = last_states(model, [e.prompt for e in examples[:: len(examples) // SIZED + 1]], batch_tokens)
    prices, size = np.array([e.price for e in examples]), float(np.sqrt(np.square(states).mean()))
    settings = {"states": "tuned", "blocks": [len(model.layers)], "mean": False, "joint": True}
    return new_price_head(prices, model.config.hidden_size, size, settings, model.device)


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
