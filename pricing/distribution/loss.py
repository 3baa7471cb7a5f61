"""What the model is taught: the tokens of the answer, the price alone, or to be near as well as right.

    python train.py --bits 4 --loss soft          python -m pytest tests/pricing/test_loss.py

`answer`: cross-entropy on the tokens of `123.00`. To it, 124 is as wrong as 900: every wrong digit costs the same,
and the third digit, mostly noise, counts as much as the first.

`price`: the same on the tokens that choose the price and no others: 1, 2, 3 of `123.00`, but 1, 2 and "." of `12.00`
(that "." says that no digit follows). The tokens after them are the same for every item; they carry no loss and are not
counted.

`soft`: the one right price is replaced by a distribution q over whole dollars, log-normal around the true price with
relative width `width` (0.1: two thirds of it within 10 %). Along the true digits, each step then has a soft target:
the share of q that lies below each next token. For 98 dollars and width 0.1 the first digit is taught as 9 or 1 (100
to 119), the second as 8 and its neighbours. In terms of q and the model's P, with the steps s of the true path,

    loss = - sum_s sum_token q(token | s) ln P(token | s)

which is the part of the cross-entropy of q and P that lies on one path; it needs no further forward pass. What follows
the price (".00") stays plain cross-entropy. For a tokeniser with one token a price, s is one step and the loss is the
whole cross-entropy.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pricing.data.batch import Batch
from pricing.data.prompt import Example
from pricing.distribution.decode import PRICES, PriceTree

LOSSES = ("answer", "price", "soft")


class AnswerLoss:
    """Sum of the loss over a batch's supervised tokens, in nats; the caller divides by their number over the whole
    window. It has two halves: `prepare` reads the examples and runs on the CPU; the call takes tensors only, of fixed
    sizes, so that a GPU can record it once and replay it (fast/graph.py).

    `kind` is one of LOSSES, `width` the relative width of the soft targets. Raises ValueError for another kind."""

    def __init__(self, kind: str, tree: PriceTree, width: float, device: torch.device | str):
        if kind not in LOSSES:
            raise ValueError(f"unknown loss {kind!r}; choose from {', '.join(LOSSES)}")
        self.kind, self.tree, self.width = kind, tree, width
        below = tree.below()  # (nodes, PRICES) float64
        # child[node, c] is the node that choice c leads to; where there is none, the extra row of `below`, all zeros.
        self.child = torch.full((len(tree.parent), len(tree.choices)), len(tree.parent))
        for node in range(1, len(tree.parent)):
            self.child[tree.parent[node], tree.choice[node]] = node
        self.below = torch.cat([below, torch.zeros(1, PRICES)])
        self.choices = torch.tensor(tree.choices, device=device)

    def path(self, example: Example) -> list[int]:
        """The inner nodes that the answer passes, one for each of the tokens that choose its price"""
        nodes = []
        for step in range(len(example.answer)):
            node = self.tree.number.get(tuple(example.answer[:step]))
            if node is None or self.tree.leaf[node] is not None:
                break  # the price is complete
            nodes.append(node)
        return nodes

    def learnt(self, example: Example) -> int:
        """How many of the answer's tokens carry loss, from its first on"""
        return len(self.path(example)) if self.kind == "price" else len(example.answer)

    def supervised(self, batch: Batch) -> int:
        """How many tokens of the batch carry loss: what the sum over a window is divided by"""
        return sum(self.learnt(example) for example in batch.examples)

    def soft_target(self, prices: list[float]) -> Tensor:
        """q: the probability of each whole dollar around the true price, rows summing to one  # (B, PRICES)"""
        # Dollar n stands for the prices from n - 0.5 to n + 0.5.
        edges = (torch.arange(PRICES + 1, dtype=torch.float64) - 0.5).clamp(min=1e-3).log()
        centre = torch.tensor(prices, dtype=torch.float64).clamp(min=0.5).log()[:, None]
        reached = torch.special.ndtr((edges - centre) / self.width)  # (B, PRICES + 1)
        q = reached.diff(dim=1)
        return q / q.sum(1, keepdim=True)

    def steps(self, examples: list[Example]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Where prices are chosen: the index among the M answer positions, the example, the node  # (P,) each"""
        paths = [self.path(example) for example in examples]
        starts = np.cumsum([0] + [len(example.answer) for example in examples])
        positions = [start + step for start, path in zip(starts, paths, strict=False) for step in range(len(path))]
        rows = [row for row, path in enumerate(paths) for _ in path]
        nodes = [node for path in paths for node in path]
        return np.array(positions, np.int64), np.array(rows, np.int64), np.array(nodes, np.int64)

    def prepare(self, batch: Batch) -> dict[str, np.ndarray]:
        """What the call needs besides logits: `targets` (M,), -100 for none, and for `soft` also `target_shares`
        (M, k), the soft target at positions that choose a price, 0 elsewhere"""
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
        return {"targets": targets}

    def __call__(self, logits: Tensor, prepared: dict[str, Tensor], states: Tensor | None = None) -> Tensor:
        """Logits (M, V) float32 at the answer positions -> () nats, summed over the tokens that have a target.

        `states` (M, C), which the logits come from, are not read here; JointLoss (quantile_head.py) does."""
        loss = F.cross_entropy(logits, prepared["targets"], reduction="sum", ignore_index=-100)
        if self.kind == "soft":
            log_probs = logits[:, self.choices] - logits.logsumexp(dim=1, keepdim=True)  # (M, k)
            loss = loss - (prepared["target_shares"] * log_probs).sum()
        return loss
