"""What the model is taught: the tokens of the answer, as they are or with near prices as nearly right.

`answer`: cross-entropy on the tokens of `123.00`. To it, 124 is as wrong as 900: every wrong digit costs the same,
and the third digit, mostly noise, asks for as much as the first.

`soft`: the one right price is replaced by a distribution q over whole dollars, log-normal around the true price with
relative width `width` (0.1: two thirds of it within 10 %). Along the true digits, each step then has a soft target:
the share of q that lies below each next token. For 98 dollars and width 0.1 the first digit is taught as 9 or 1 (100
to 119), the second as 8 and its neighbours. In terms of q and the model's P, with the steps s of the true path,

    loss = - sum_s sum_token q(token | s) ln P(token | s)

the part of the cross-entropy of q and P that one path carries; no further forward is needed. What follows the price
(".00") stays plain cross-entropy. For a tokeniser with one token a price, s is one step and the loss is the whole
cross-entropy.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pricing.batch import Batch
from pricing.decode import PRICES, PriceTree
from pricing.prompt import Example

LOSSES = ("answer", "soft")


class AnswerLoss:
    """Sum of the loss over a batch's supervised tokens, in nats; the caller divides by their number over the whole
    window. In two halves: `prepare` knows the examples and runs on the CPU, the call is tensors only, of fixed sizes,
    so that it can be recorded once and replayed (engine.py)."""

    def __init__(self, kind: str, tree: PriceTree, width: float, device: torch.device | str):
        self.kind, self.tree, self.width = kind, tree, width
        below = tree.below()  # (nodes, PRICES) float64
        # child[node, c] is the node that choice c leads to; one more row of `below`, all zeros, stands for "nowhere".
        self.child = torch.full((len(tree.parent), len(tree.choices)), len(tree.parent))
        for node in range(1, len(tree.parent)):
            self.child[tree.parent[node], tree.choice[node]] = node
        self.below = torch.cat([below, torch.zeros(1, PRICES)])
        self.choices = torch.tensor(tree.choices, device=device)

    def neighbours(self, prices: list[float]) -> Tensor:
        """q: the probability of each whole dollar around the true price, rows summing to one  # (B, PRICES)"""
        edges = (
            (torch.arange(PRICES + 1, dtype=torch.float64) - 0.5).clamp(min=1e-3).log()
        )  # dollar n is what lies from n - 0.5 to n + 0.5
        centre = torch.tensor(prices, dtype=torch.float64).clamp(min=0.5).log()[:, None]
        reached = torch.special.ndtr((edges - centre) / self.width)  # (B, PRICES + 1)
        q = reached.diff(dim=1)
        return q / q.sum(1, keepdim=True)

    def soft_targets(self, examples: list[Example]) -> tuple[Tensor, Tensor]:
        """Which of the M answer positions choose the price, and for those q(token | path so far)  # (P,), (P, k)"""
        mass = self.neighbours([example.price for example in examples]) @ self.below.T  # (B, nodes + 1)
        positions, rows, nodes, start = [], [], [], 0
        for row, example in enumerate(examples):
            for step in range(len(example.answer)):
                node = self.tree.number.get(tuple(example.answer[:step]))
                if node is None or self.tree.leaf[node] is not None:
                    break  # the price is complete
                positions.append(start + step)
                rows.append(row)
                nodes.append(node)
            start += len(example.answer)
        target = mass[torch.tensor(rows)[:, None], self.child[torch.tensor(nodes)]]  # (P, k)
        return torch.tensor(positions), target / target.sum(1, keepdim=True)

    def prepare(self, batch: Batch) -> dict[str, np.ndarray]:
        """What the call needs besides logits: `targets` (M,), -100 for none; for `soft` also `target_shares` (M, k)"""
        if self.kind == "answer":
            return {"targets": batch.targets}
        targets = batch.targets.copy()
        shares = np.zeros((len(targets), len(self.tree.choices)), np.float32)
        if batch.examples:
            positions, target = self.soft_targets(batch.examples)
            shares[positions], targets[positions] = target, -100
        return {"targets": targets, "target_shares": shares}

    def __call__(self, logits: Tensor, prepared: dict[str, Tensor]) -> Tensor:
        """Logits (M, V) float32 at the answer positions -> () nats, summed over the tokens that have a target"""
        loss = F.cross_entropy(logits, prepared["targets"], reduction="sum", ignore_index=-100)
        if self.kind == "soft":
            log_probs = logits[:, self.choices] - logits.logsumexp(dim=1, keepdim=True)  # (M, k)
            loss = loss - (prepared["target_shares"] * log_probs).sum()
        return loss
