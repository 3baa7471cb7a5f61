"""What the model is taught: the tokens of the answer, the price alone, or to be near as well as right.

    python train.py --bits 4 --loss crps --crps-weight 2          python -m pytest tests/test_loss.py

`answer`: cross-entropy on the tokens of `123.00`. To it, 124 is as wrong as 900: every wrong digit costs the same,
and the third digit, mostly noise, asks for as much as the first.

`price`: the same on the tokens that choose the price and no others: 1, 2, 3 of `123.00`, but 1, 2 and "." of `12.00`
(that "." says that no digit follows). The rest is the same for every item, and carries no loss and is not counted.

`soft`: the one right price is replaced by a distribution q over whole dollars, log-normal around the true price with
relative width `width` (0.1: two thirds of it within 10 %). Along the true digits, each step then has a soft target:
the share of q that lies below each next token. For 98 dollars and width 0.1 the first digit is taught as 9 or 1 (100
to 119), the second as 8 and its neighbours. In terms of q and the model's P, with the steps s of the true path,

    loss = - sum_s sum_token q(token | s) ln P(token | s)

the part of the cross-entropy of q and P that one path carries; no further forward is needed. What follows the price
(".00") stays plain cross-entropy. For a tokeniser with one token a price, s is one step and the loss is the whole
cross-entropy.

`crps`: `price` + `crps_weight` * path CRPS: how far the distribution over whole dollars is from the price, at each step
of its path (pricing/crps.py).

Scale: cross-entropy and path CRPS are both summed over the items of a window and divided by the same number, its
supervised tokens. So `crps_weight` is nats for each dollar (or each unit of ln price) of an item's CRPS, whatever the
batch, and what is minimised is (nats an item + crps_weight * CRPS an item) / (price tokens an item).
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pricing.data.batch import Batch
from pricing.data.prompt import Example
from pricing.distribution.crps import PathCRPS
from pricing.distribution.decode import PRICES, PriceTree

LOSSES = ("answer", "price", "crps", "soft")


class AnswerLoss:
    """Sum of the loss over a batch's supervised tokens, in nats; the caller divides by their number over the whole
    window. In two halves: `prepare` knows the examples and runs on the CPU, the call is tensors only, of fixed sizes,
    so that it can be recorded once and replayed (engine.py)."""

    def __init__(
        self, kind: str, tree: PriceTree, width: float, device: torch.device | str, *,
        crps_weight: float = 1.0, crps_scale: str = "log",
    ):  # fmt: skip
        if kind not in LOSSES:
            raise ValueError(f"unknown loss {kind!r}; choose from {', '.join(LOSSES)}")
        self.kind, self.tree, self.width, self.crps_weight = kind, tree, width, crps_weight
        below = tree.below()  # (nodes, PRICES) float64
        # child[node, c] is the node that choice c leads to; one more row of `below`, all zeros, stands for "nowhere".
        self.child = torch.full((len(tree.parent), len(tree.choices)), len(tree.parent))
        for node in range(1, len(tree.parent)):
            self.child[tree.parent[node], tree.choice[node]] = node
        self.below = torch.cat([below, torch.zeros(1, PRICES)])
        self.choices = torch.tensor(tree.choices, device=device)
        self.index = {token: i for i, token in enumerate(tree.choices)}
        self.path_crps = PathCRPS(tree, crps_scale, device) if kind == "crps" else None

    def path(self, example: Example) -> list[int]:
        """The inner nodes that the answer passes, one for each of its first tokens: those that choose the price"""
        nodes = []
        for step in range(len(example.answer)):
            node = self.tree.number.get(tuple(example.answer[:step]))
            if node is None or self.tree.leaf[node] is not None:
                break  # the price is complete
            nodes.append(node)
        return nodes

    def learnt(self, example: Example) -> int:
        """How many of the answer's tokens, from its first, carry loss"""
        return len(self.path(example)) if self.kind in ("price", "crps") else len(example.answer)

    def supervised(self, batch: Batch) -> int:
        """Tokens of the batch that carry loss: what its sum is divided by, window by window"""
        return sum(self.learnt(example) for example in batch.examples)

    def soft_target(self, prices: list[float]) -> Tensor:
        """q: the probability of each whole dollar around the true price, rows summing to one  # (B, PRICES)"""
        # Dollar n is what lies from n - 0.5 to n + 0.5.
        edges = (torch.arange(PRICES + 1, dtype=torch.float64) - 0.5).clamp(min=1e-3).log()
        centre = torch.tensor(prices, dtype=torch.float64).clamp(min=0.5).log()[:, None]
        reached = torch.special.ndtr((edges - centre) / self.width)  # (B, PRICES + 1)
        q = reached.diff(dim=1)
        return q / q.sum(1, keepdim=True)

    def steps(self, examples: list[Example]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of the tokens that choose a price: index among the M answer positions, example, node  # (P,) each"""
        paths = [self.path(example) for example in examples]
        starts = np.cumsum([0] + [len(example.answer) for example in examples])
        positions = [start + step for start, path in zip(starts, paths, strict=False) for step in range(len(path))]
        rows = [row for row, path in enumerate(paths) for _ in path]
        nodes = [node for path in paths for node in path]
        return np.array(positions, np.int64), np.array(rows, np.int64), np.array(nodes, np.int64)

    def prepare(self, batch: Batch) -> dict[str, np.ndarray]:
        """What the call needs besides logits: `targets` (M,), -100 for none; for `soft` also `target_shares` (M, k);
        for `crps` also `rows` and `taken` (M,), the node's row in the tables and the index of the true choice"""
        if self.kind == "answer":
            return {"targets": batch.targets}
        positions, rows, nodes = self.steps(batch.examples)
        if self.kind == "soft":
            targets = batch.targets.copy()
            shares = np.zeros((len(targets), len(self.tree.choices)), np.float32)
            if batch.examples:
                q = self.soft_target([example.price for example in batch.examples])
                below = (q @ self.below.T)[torch.tensor(rows)[:, None], self.child[torch.tensor(nodes)]]  # (P, k)
                shares[positions], targets[positions] = below / below.sum(1, keepdim=True), -100
            return {"targets": targets, "target_shares": shares}
        targets = np.full_like(batch.targets, -100)
        targets[positions] = batch.targets[positions]
        if self.kind == "price":
            return {"targets": targets}
        table_rows, taken = np.full_like(targets, self.path_crps.nowhere), np.zeros_like(targets)
        table_rows[positions] = [self.path_crps.row[node] for node in nodes]
        taken[positions] = [self.index[token] for token in targets[positions]]
        return {"targets": targets, "rows": table_rows, "taken": taken}

    def __call__(self, logits: Tensor, prepared: dict[str, Tensor], states: Tensor | None = None) -> Tensor:
        """Logits (M, V) float32 at the answer positions -> () nats, summed over the tokens that have a target. The
        states that they come from are for losses that read them, too (pricing.head.JointLoss)."""
        loss = F.cross_entropy(logits, prepared["targets"], reduction="sum", ignore_index=-100)
        if self.kind == "soft":
            log_probs = logits[:, self.choices] - logits.logsumexp(dim=1, keepdim=True)  # (M, k)
            loss = loss - (prepared["target_shares"] * log_probs).sum()
        if self.kind == "crps":
            score = self.path_crps(logits[:, self.choices], prepared["rows"], prepared["taken"])
            loss = loss + self.crps_weight * score
        return loss
