"""The price head: a small network that reads quantiles of the log price off the language model's last state.

    python train.py --head quantile                 trained together with the adapter (the default)
    python evaluate.py --ckpt out/ --decode head    its median alone; without --decode, half and half with the digits

The head reads the last token's state of a prompt, the vector that lm_head reads there. A multilayer perceptron turns it
into the quantiles q = 0.025, 0.05, 0.10, ... 0.95, 0.975 of the log price. It learns by the pinball loss

    l_q(y, f) = max(q (y - f), (q - 1) (y - f))         y, f: log price; its expectation is least at the q-quantile

(Koenker and Bassett 1978), averaged over the 21 quantiles. At q = 0.5 that is half the absolute error, and since exp is
monotone, exp of the median of the log price is the median of the price: the guess of least expected absolute error.

The gradient flows on through the state into the adapter (JointLoss). That is what makes the head worth it: to the
cross-entropy of digits 99 and 100 have nothing in common, the pinball loss knows that they are near, and it learns at
one token an item what the digits learn token by token.

Quantiles must not cross. The network gives the median m and 20 numbers g, and from the median outwards

    f_0.50 = m        f_0.55 = f_0.50 + softplus(g)      f_0.60 = f_0.55 + softplus(g)      ...      likewise downwards

Anchored at the median, not at the lowest quantile, so that the number that matters most is not a sum of ten others.
"""

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from common.files import whole_file
from pricing.data.batch import Batch
from pricing.distribution.intervals import LEVELS, MIDDLE, in_dollars

FILE = "head.safetensors"
WIDTH = 256  # of both hidden layers
# The layers' names in head.safetensors -> in PriceHead.network. Earlier versions averaged several networks, `members`,
# with dropout between their layers (hence 0, 3, 6); the file keeps the names, so old and new files read the same.
NAMES = {"members.0.read.0": "network.0", "members.0.read.3": "network.2", "members.0.read.6": "network.4"}


def pinball(quantiles: Tensor, truth: Tensor, levels: Tensor) -> Tensor:
    """Mean over the levels of max(q (y - f), (q - 1) (y - f)).  f (B, Q), y (B,), q (Q,) -> (B,)"""
    above = truth[:, None] - quantiles  # (B, Q)
    return torch.maximum(levels * above, (levels - 1) * above).mean(dim=1)


def ordered(raw: Tensor) -> Tensor:
    """Any numbers (B, Q) -> (B, Q) that never fall along a row: the median, and cumulative softplus both ways."""
    gaps = F.softplus(raw)
    below = raw[:, MIDDLE : MIDDLE + 1] - gaps[:, :MIDDLE].flip(1).cumsum(1).flip(1)
    above = raw[:, MIDDLE : MIDDLE + 1] + gaps[:, MIDDLE + 1 :].cumsum(1)
    return torch.cat([below, raw[:, MIDDLE : MIDDLE + 1], above], dim=1)


class PriceHead(nn.Module):
    """(B, I) states -> (B, Q) quantiles of the standardised log price, by two hidden layers; `quantiles` and `median`
    give log dollars and dollars.

    A state x is read as (x - mean) / spread; a price p in dollars as (ln p - price_mean) / price_spread, so that the
    training prices have mean 0 and spread 1. `settings` says where the states come from; it is saved with the head.
    """

    def __init__(self, inputs: int, width: int = WIDTH, settings: dict | None = None) -> None:
        super().__init__()
        self.inputs, self.width, self.settings = inputs, width, dict(settings or {})
        self.register_buffer("mean", torch.zeros(inputs))
        self.register_buffer("spread", torch.ones(inputs))
        self.register_buffer("price_mean", torch.zeros(()))
        self.register_buffer("price_spread", torch.ones(()))
        self.network = nn.Sequential(
            nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, len(LEVELS))
        )

    def forward(self, states: Tensor) -> Tensor:
        return ordered(self.network((states - self.mean) / self.spread))

    @torch.no_grad()
    def quantiles(self, states) -> np.ndarray:
        """Quantiles of the log price at LEVELS.  (n, I) array or tensor -> (n, 21) float64, log dollars

        Raises ValueError for states of another width, as of another base model."""
        states = torch.as_tensor(states, dtype=torch.float32, device=self.mean.device)
        if states.ndim != 2 or states.shape[1] != self.inputs:
            sizes = f"the head reads {self.inputs} numbers an item, the states are {tuple(states.shape)}"
            raise ValueError(f"{sizes}: another base model?")
        parts = [self(part).double() for part in states.split(4096)]
        standardised = torch.cat(parts) if parts else torch.zeros(0, len(LEVELS), dtype=torch.float64)
        return (standardised * self.price_spread.double() + self.price_mean.double()).cpu().numpy()

    def median(self, states) -> np.ndarray:
        """The price of least expected absolute error of each item.  (n, I) -> (n,) dollars"""
        return in_dollars(self.quantiles(states)[:, MIDDLE])

    @torch.no_grad()
    def start(self, prices: np.ndarray) -> None:
        """Take the prices' units (n,) dollars, and begin with the quantiles of a normal distribution around their mean
        in log price, half as wide as they are."""
        target = torch.log(torch.as_tensor(prices, dtype=torch.float64))
        self.price_mean.copy_(target.mean())
        self.price_spread.copy_(target.std(correction=0).clamp(min=1e-6))
        normal = 0.5 * torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(LEVELS))
        bias = torch.log(torch.expm1(normal.diff().abs()))  # the inverse of softplus  (Q - 1,)
        self.network[-1].weight.mul_(0.1)
        self.network[-1].bias.copy_(torch.cat([bias[:MIDDLE], torch.zeros(1), bias[MIDDLE:]]))


def price_head_parameters(inputs: int) -> int:
    """How many numbers a price head for states (n, inputs) trains"""
    return sum((a + 1) * b for a, b in ((inputs, WIDTH), (WIDTH, WIDTH), (WIDTH, len(LEVELS))))


def new_price_head(prices: np.ndarray, inputs: int, size: float, settings: dict, device) -> PriceHead:
    """A price head to be trained with the adapter. It reads `inputs` numbers, each of about `size`; `prices` (n,) are
    the training items' in dollars."""
    head = PriceHead(inputs, settings=settings)
    head.start(prices)
    head.spread.fill_(size)
    return head.to(device)


class JointLoss:
    """The loss of the answer's tokens + `weight` * the pinball loss of the items, both as sums; the caller divides by
    the supervised tokens. `weight` is nats for a unit of an item's pinball loss (in standardised log price), `items`
    how many items a batch holds at most."""

    def __init__(self, answer, head: PriceHead, weight: float, items: int):
        self.answer, self.head, self.weight, self.items = answer, head, weight, items
        self.learnt, self.supervised = answer.learnt, answer.supervised
        self.levels = torch.tensor(LEVELS, device=head.mean.device)

    def prepare(self, batch: Batch) -> dict[str, np.ndarray]:
        """Besides what `answer` needs: `first` (items,), where among the M positions each item's first answer token is
        predicted; `log_price`; `counts`, 1 for an item and 0 beyond the last"""
        first, log_price = np.zeros(self.items, np.int64), np.zeros(self.items, np.float32)
        counts, n = np.zeros(self.items, np.float32), len(batch.examples)
        first[:n] = np.cumsum([0] + [len(e.answer) for e in batch.examples])[:n]
        log_price[:n], counts[:n] = np.log([e.price for e in batch.examples]), 1
        return self.answer.prepare(batch) | {"first": first, "log_price": log_price, "counts": counts}

    def __call__(self, logits: Tensor, prepared: dict[str, Tensor], states: Tensor) -> Tensor:
        """Logits (M, V), states (M, C) -> () nats"""
        quantiles = self.head(states[prepared["first"]])  # (items, Q)
        truth = (prepared["log_price"] - self.head.price_mean) / self.head.price_spread
        scores = pinball(quantiles, truth, self.levels)  # (items,)
        return self.answer(logits, prepared) + self.weight * (scores * prepared["counts"]).sum()


def save_head(head: PriceHead, directory: str | Path) -> Path:
    """Write head.safetensors, whole or not at all: tensors, and the settings as JSON in its metadata."""
    path = Path(directory) / FILE
    names = {ours: name for name, ours in NAMES.items()}
    tensors = {}
    for name, value in head.state_dict().items():
        layer, _, kind = name.rpartition(".")
        tensors[f"{names[layer]}.{kind}" if layer else name] = value.detach().cpu().contiguous()
    shape = {"inputs": head.inputs, "width": head.width, "members": 1}
    with whole_file(path) as part:
        save_file(tensors, part, metadata={"head": json.dumps({"shape": shape, "settings": head.settings})})
    return path


def load_head(directory: str | Path) -> PriceHead:
    """The price head of a checkpoint directory, on the CPU. Raises ValueError where there is none, where it is damaged,
    or where it was trained after its run, as earlier versions could."""
    path = Path(directory) / FILE
    if not path.is_file():
        raise ValueError(f"{directory} has no price head: it is trained with the adapter, by train.py --head quantile")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = json.loads(file.metadata()["head"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        shape, settings = metadata["shape"], metadata["settings"]
        if not settings.get("joint"):
            raise ValueError(
                f"{path} was trained after its run, which is no longer supported: train again with "
                "`train.py --head quantile`, or, where the run had --head none, remove this file to price by its digits"
            )
        head = PriceHead(shape["inputs"], shape["width"], settings)
        parts = [(name, *name.rpartition(".")) for name in tensors]
        head.load_state_dict(
            {f"{NAMES[layer]}.{kind}" if layer else name: tensors[name] for name, layer, _, kind in parts}
        )
    except (SafetensorError, RuntimeError, KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged or of another version: {' '.join(str(error).split())[:200]}") from None
    return head.eval().requires_grad_(False)
