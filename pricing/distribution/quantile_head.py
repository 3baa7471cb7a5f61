"""A small network that reads a price off the language model's states: quantiles of the log price.

    python train.py --head quantile                 trained together with the adapter (the default)
    python -m pricing.head --ckpt out/              or afterwards: read the states once, then train for some seconds
    python evaluate.py --ckpt out/ --decode head    alone; without --decode, half and half with the digits

Each prompt becomes one vector, and a multilayer perceptron learns the quantiles q = 0.025, 0.05, 0.10, ... 0.95, 0.975
of the log price from it by the pinball loss

    l_q(y, f) = max(q (y - f), (q - 1) (y - f))         y, f: log price; its expectation is least at the q-quantile

(Koenker and Bassett 1978), the mean over the 21 quantiles. At q = 0.5 that is half the absolute error, and since exp is
monotone, exp of the median of the log price is the median of the price: what has the least absolute error in dollars.

Together with the adapter (JointLoss), the vector is the last token's state, what the model's own head reads there, and
the loss flows on into the adapter. To the cross-entropy of digits 99 and 100 have nothing in common; this term knows
that they are near, and it asks at one token an item for what the digits are asked token by token.

Afterwards (fit_head), the language model is frozen and the vector may join states after several blocks and their means
over the tokens (states.last_states).

Quantiles cannot cross. The network gives the median m and 20 numbers g, and from the median outwards

    f_0.50 = m        f_0.55 = f_0.50 + softplus(g)      f_0.60 = f_0.55 + softplus(g)      ...      likewise downwards

Anchored at the median, not at the lowest, so that the number that matters most is no sum of ten others.
Afterwards, training stops by the pinball loss in dollars, of exp f, on the validation items, and keeps the best epoch:
in dollars because the error is measured so, over all quantiles because the median settles long before the ends do.
Test items are not even read. Several networks from several seeds are averaged, quantile by quantile in log price, which
keeps the order of the quantiles.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

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
JOINT_WIDTH = 256  # of both hidden layers of the head that is trained with the adapter
STATES = ("tuned", "untuned", "both")  # the states of the model with its adapter, without it, or side by side


@dataclass(frozen=True)
class Recipe:
    """How a head is trained."""

    width: int = 512  # of both hidden layers
    members: int = 3  # networks, each from a seed of its own
    dropout: float = 0.3
    lr: float = 1e-3  # peak: 10 % warm-up, then a cosine to 0 (one cycle)
    weight_decay: float = 0.01
    epochs: int = 40  # at most
    patience: int = 12  # epochs without a better validation error
    batch: int = 256  # items, fewer for small data
    seed: int = 0


def pinball(quantiles: Tensor, truth: Tensor, levels: Tensor) -> Tensor:
    """Mean over the levels of max(q (y - f), (q - 1) (y - f)).  f (B, Q), y (B,), q (Q,) -> (B,)"""
    above = truth[:, None] - quantiles  # (B, Q)
    return torch.maximum(levels * above, (levels - 1) * above).mean(dim=1)


def ordered(raw: Tensor) -> Tensor:
    """(B, Q) of any numbers -> (B, Q) that never fall along a row: the median, and cumulative softplus both ways."""
    gaps = F.softplus(raw)
    below = raw[:, MIDDLE : MIDDLE + 1] - gaps[:, :MIDDLE].flip(1).cumsum(1).flip(1)
    above = raw[:, MIDDLE : MIDDLE + 1] + gaps[:, MIDDLE + 1 :].cumsum(1)
    return torch.cat([below, raw[:, MIDDLE : MIDDLE + 1], above], dim=1)


class Member(nn.Module):
    """Two hidden layers.  (B, I) standardised states -> (B, Q) quantiles of the standardised log price"""

    def __init__(self, inputs: int, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.read = nn.Sequential(
            nn.Linear(inputs, width), nn.ReLU(), nn.Dropout(dropout),
            nn.Linear(width, width), nn.ReLU(), nn.Dropout(dropout),
            nn.Linear(width, len(LEVELS)),
        )  # fmt: skip

    def start(self) -> None:
        """Begin with the quantiles of a normal distribution of half the spread of all prices, around 0."""
        normal = 0.5 * torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(LEVELS))
        gaps = normal.diff().abs()  # (Q - 1,)
        with torch.no_grad():
            self.read[-1].weight.mul_(0.1)
            bias = torch.log(torch.expm1(gaps))  # the inverse of softplus
            self.read[-1].bias.copy_(torch.cat([bias[:MIDDLE], torch.zeros(1), bias[MIDDLE:]]))

    def forward(self, x: Tensor) -> Tensor:
        return ordered(self.read(x))


class Head(nn.Module):
    """The trained head: standardisation, networks, and `settings` (where its states come from). (n, I) -> dollars"""

    def __init__(self, inputs: int, width: int, members: int, dropout: float = 0.0, settings: dict | None = None):
        super().__init__()
        self.inputs, self.settings = inputs, dict(settings or {})
        self.register_buffer("mean", torch.zeros(inputs))
        self.register_buffer("spread", torch.ones(inputs))
        self.register_buffer("price_mean", torch.zeros(()))  # of the training items' log price
        self.register_buffer("price_spread", torch.ones(()))
        self.members = nn.ModuleList(Member(inputs, width, dropout) for _ in range(members))

    def standardise(self, states) -> Tensor:
        """(n, I) array or tensor -> (n, I) float32, each column of mean 0 and spread 1 over the training items"""
        states = torch.as_tensor(states, dtype=torch.float32, device=self.mean.device)
        if states.ndim != 2 or states.shape[1] != self.inputs:
            sizes = f"the head reads {self.inputs} numbers an item, the states are {tuple(states.shape)}"
            raise ValueError(f"{sizes}: another base model?")
        return (states - self.mean) / self.spread

    @torch.no_grad()
    def quantiles(self, states) -> np.ndarray:
        """Quantiles of the log price at LEVELS, the mean of the members'.  (n, I) -> (n, 21) float64, log dollars"""
        self.eval()
        parts = [
            torch.stack([member(part) for member in self.members]).double().mean(0)
            for part in self.standardise(states).split(4096)
        ]
        found = torch.cat(parts) if parts else torch.zeros(0, len(LEVELS), dtype=torch.float64)
        return (found * self.price_spread.double() + self.price_mean.double()).cpu().numpy()

    def median(self, states) -> np.ndarray:
        """One price an item: what has the least expected absolute error.  (n, I) -> (n,) dollars"""
        return in_dollars(self.quantiles(states)[:, MIDDLE])

    def begin(self, prices: np.ndarray) -> None:
        """The prices' units, and quantiles to start from"""
        target = torch.log(torch.as_tensor(prices, dtype=torch.float64))
        self.price_mean.copy_(target.mean())
        self.price_spread.copy_(target.std(correction=0).clamp(min=1e-6))
        for member in self.members:
            member.start()


def joint_numbers(inputs: int) -> int:
    """How many numbers the head that is trained with the adapter has"""
    return sum((a + 1) * b for a, b in ((inputs, JOINT_WIDTH), (JOINT_WIDTH, JOINT_WIDTH), (JOINT_WIDTH, len(LEVELS))))


def joint_head(prices: np.ndarray, inputs: int, size: float, settings: dict, device) -> Head:
    """A head to be trained with the adapter: one network that reads `inputs` numbers, each of about `size`."""
    head = Head(inputs, JOINT_WIDTH, 1, settings=settings)
    head.begin(prices)
    head.spread.fill_(size)
    return head.to(device)


class JointLoss:
    """The loss of the answer's tokens + `weight` * the pinball loss of the items, both as sums; the caller divides by
    the supervised tokens. `weight` is nats for a unit of an item's pinball loss (in standardised log price)."""

    def __init__(self, answer, head: Head, weight: float, items: int):
        self.answer, self.head, self.weight, self.items = answer, head, weight, items
        self.learnt, self.supervised = answer.learnt, answer.supervised
        self.levels = torch.tensor(LEVELS, device=head.mean.device)

    def prepare(self, batch: Batch) -> dict[str, np.ndarray]:
        """Beside what `answer` needs: `first` (items,), where among the M positions each item's first answer token is
        predicted; `log_price`; `counts`, 1 for an item and 0 beyond the last"""
        first, log_price = np.zeros(self.items, np.int64), np.zeros(self.items, np.float32)
        counts, n = np.zeros(self.items, np.float32), len(batch.examples)
        first[:n] = np.cumsum([0] + [len(e.answer) for e in batch.examples])[:n]
        log_price[:n], counts[:n] = np.log([e.price for e in batch.examples]), 1
        return self.answer.prepare(batch) | {"first": first, "log_price": log_price, "counts": counts}

    def __call__(self, logits: Tensor, prepared: dict[str, Tensor], states: Tensor) -> Tensor:
        """Logits (M, V), states (M, C) -> () nats"""
        head = self.head
        found = head.members[0]((states[prepared["first"]] - head.mean) / head.spread)  # (items, Q)
        truth = (prepared["log_price"] - head.price_mean) / head.price_spread
        scores = pinball(found, truth, self.levels)  # (items,)
        return self.answer(logits, prepared) + self.weight * (scores * prepared["counts"]).sum()


def fit_member(
    head: Head, member: Member, known: tuple[Tensor, Tensor], held: tuple[Tensor, np.ndarray], recipe: Recipe, seed: int
) -> tuple[float, int]:
    """Train one network in place. `known`: standardised states and log prices; `held`: standardised states and
    dollars. Returns the least validation loss, pinball in dollars, and its epoch."""
    (x, y), (val_x, val_price) = known, held
    levels = torch.tensor(LEVELS, device=x.device)
    batch = min(max(len(x) // 50, 16), recipe.batch)
    optimiser = torch.optim.AdamW(member.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    steps = max(recipe.epochs * -(-len(x) // batch), 11)  # of ten steps OneCycleLR cannot take a tenth to warm up
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=recipe.lr, total_steps=steps, pct_start=0.1)
    order = torch.Generator().manual_seed(seed)
    best, best_epoch, kept = np.inf, 0, None
    for epoch in range(1, recipe.epochs + 1):
        member.train()
        for rows in torch.randperm(len(x), generator=order).to(x.device).split(batch):
            loss = pinball(member(x[rows]), y[rows], levels).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
        member.eval()
        with torch.no_grad():
            found = member(val_x).double() * head.price_spread.double() + head.price_mean.double()
        found = torch.from_numpy(in_dollars(found.cpu().numpy()))
        error = float(pinball(found, torch.from_numpy(val_price), torch.tensor(LEVELS)).mean())
        if error < best:
            best, best_epoch = error, epoch
            kept = {name: value.clone() for name, value in member.state_dict().items()}
        elif epoch - best_epoch >= recipe.patience:
            break
    if kept is None:
        raise ValueError("the head's training gave no finite validation error: are the states finite?")
    member.load_state_dict(kept)
    return best, best_epoch


def fit_head(
    items: list,
    states,
    recipe: Recipe = Recipe(),
    device: str | torch.device = "cpu",
    settings: dict | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Head:
    """A head trained on the items of the split `train`, stopped on those of `val`; others are not looked at.

    `states` (items, I), in the order of `items`. On a CPU the same seed gives the same head, bit for bit. Raises
    ValueError for a split without items or states that are not finite.
    """
    if len(items) != len(states):
        raise ValueError(f"{len(items)} items, but states of {len(states)}")
    at = {split: np.flatnonzero([item.split == split for item in items]) for split in ("train", "val")}
    for split, rows in at.items():
        if not len(rows):
            raise ValueError(f"a head needs training and validation items; none of the {len(items)} is in {split}")
    price = {split: np.array([items[row].price for row in rows]) for split, rows in at.items()}  # dollars
    chosen = {split: torch.as_tensor(np.asarray(states)[rows], dtype=torch.float32) for split, rows in at.items()}
    if not all(torch.isfinite(part).all() for part in chosen.values()):
        raise ValueError("the states hold numbers that are not finite: the model's weights are damaged or it diverged")
    on_gpu = torch.device(device).type == "cuda"
    with torch.random.fork_rng([torch.cuda.current_device()] if on_gpu else []):  # leaves the caller's random numbers
        torch.manual_seed(recipe.seed)
        head = Head(chosen["train"].shape[1], recipe.width, recipe.members, recipe.dropout, settings).to(device)
        head.mean.copy_(chosen["train"].mean(0))
        head.spread.copy_(chosen["train"].std(0, correction=0).clamp(min=1e-6))
        head.begin(price["train"])
        x, val_x = head.standardise(chosen["train"]), head.standardise(chosen["val"])
        y = torch.log(torch.tensor(price["train"])).to(device)
        y = ((y - head.price_mean) / head.price_spread).float()
        for number, member in enumerate(head.members):
            seed = recipe.seed + number
            torch.manual_seed(seed)
            for layer in member.read:
                if isinstance(layer, nn.Linear):
                    layer.reset_parameters()
            member.start()
            error, epoch = fit_member(head, member, (x, y), (val_x, price["val"]), recipe, seed)
            say(f"network {number + 1}: validation loss ${error:.3f} after {epoch} of {recipe.epochs} epochs")
    head.eval().requires_grad_(False)
    head.settings |= {"recipe": vars(recipe), "train": len(x), "val": len(val_x)}
    head.settings["val_mae_dollars"] = float(np.abs(head.median(chosen["val"]) - price["val"]).mean())
    return head


def save_head(head: Head, directory: str | Path) -> Path:
    """Write head.safetensors, whole or not at all: tensors, and the settings as JSON in its metadata."""
    path = Path(directory) / FILE
    shape = {"inputs": head.inputs, "width": head.members[0].read[0].out_features, "members": len(head.members)}
    tensors = {name: value.detach().cpu().contiguous() for name, value in head.state_dict().items()}
    with whole_file(path) as part:
        save_file(tensors, part, metadata={"head": json.dumps({"shape": shape, "settings": head.settings})})
    return path


def load_head(directory: str | Path) -> Head:
    """The head of a checkpoint directory, on the CPU. Raises ValueError where there is none or it is damaged."""
    path = Path(directory) / FILE
    if not path.is_file():
        raise ValueError(f"{directory} has no head; train one with `python -m pricing.head --ckpt {directory}`")
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads(file.metadata()["head"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        head = Head(**about["shape"], settings=about["settings"])
        head.load_state_dict(tensors)
    except (SafetensorError, RuntimeError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged or of another version: {' '.join(str(error).split())[:200]}") from None
    return head.eval().requires_grad_(False)


def parse_arguments() -> argparse.Namespace:
    from pipeline.options import add_batch_argument, add_model_arguments

    parser = argparse.ArgumentParser(
        prog="python -m pricing.head",
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--ckpt", default="out", help="the directory that train.py wrote")
    parser.add_argument("--states", default="tuned", choices=STATES, help="of the model with its adapter, without it")
    parser.add_argument(
        "--blocks", default=None, help="take the states after these blocks, 1 to the last (default: 1/3, 2/3 and last)"
    )
    parser.add_argument(
        "--mean", action=argparse.BooleanOptionalAction, default=True, help="the mean over the tokens, too"
    )
    parser.add_argument("--items", type=int, default=None, help="learn from a fixed sample of so many training items")
    for name, about in (
        ("width", "units of each of the two hidden layers"),
        ("members", "networks, averaged"),
        ("epochs", "passes over the training items, at most"),
        ("patience", "epochs without a better validation error before it stops"),
        ("seed", "of the first network"),
    ):
        parser.add_argument(f"--{name}", type=int, default=getattr(Recipe, name), help=about)
    parser.add_argument("--dropout", type=float, default=Recipe.dropout, help="share of hidden units set to 0")
    parser.add_argument("--lr", type=float, default=Recipe.lr, help="peak learning rate")
    add_batch_argument(parser)
    add_model_arguments(parser)
    args = parser.parse_args()
    if min(args.width, args.members, args.epochs, args.patience, args.items or 1) < 1 or args.seed < 0:
        parser.error("--width, --members, --epochs, --patience and --items must be at least 1, --seed at least 0")
    if not 0 <= args.dropout < 1 or not 0 < args.lr < float("inf"):
        parser.error("--dropout must be from 0 to below 1, --lr greater than 0")
    return args


def main() -> None:
    # The one place in pricing/ that meets the network, and only when run as a command: head_after, where rooms join,
    # turns prompts into states. What is imported from here (fit_head, load_head) knows arrays only.
    from pipeline.head_after import train_head

    args = parse_arguments()
    recipe = Recipe(**{name: getattr(args, name) for name in Recipe.__dataclass_fields__ if hasattr(args, name)})
    train_head(args, recipe)


if __name__ == "__main__":
    from common.cli import run_main

    run_main(main)
