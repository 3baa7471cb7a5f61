"""From a model to a probability for each whole dollar from 0 to 999, and from there to one price.

The model writes a price as tokens. Every price 0..999 is a path in a tree of tokens, shared from the front:

    digit by digit (SmolLM2):   $ -> 1 -> 2 -> 3      100 inner nodes: the prompt, 1 to 9, and 10 to 99
    one token each (Llama 3):   $ -> 123              1 inner node: the prompt, so one forward is all

P(price) is the product of the model's probabilities along its path. A path that goes on in another price ("12" in "123") ends
with the "." of "12.00"; one that does not ("123") ends by itself. No price is then the beginning of another, so the events
exclude each other, and dividing by their sum gives the exact distribution of the price, given that the model names one.

A node that holds almost no probability (`prune`) is not opened: what it holds is shared evenly among the prices below
it, which differ by less than ten dollars. Nothing is lost, and the sum stays one.

From the distribution, the price is chosen for the error that is measured (Lukasik et al. 2024, arXiv 2403.04182): the median
has the least expected absolute error, the mean the least squared error; the mode is the likeliest. `greedy` is what
text generation at temperature 0 would write: digit after digit, each the likeliest, blind to what comes after.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

PRICES = 1000  # 0..999 dollars
PICKS = ("median", "mean", "mode", "greedy")


@dataclass
class PriceTree:
    """The token paths of all prices. Node 0 is the prompt; children are numbered breadth first."""

    choices: list[int]  # token ids that ever matter, the end mark among them  (k,)
    end: int  # index of "." in choices
    levels: list[list[int]] = field(default_factory=list)  # inner nodes by depth
    parent: list[int] = field(default_factory=list)  # inner node before each node
    choice: list[int] = field(default_factory=list)  # index in choices of the token that leads to each node
    price: list[int | None] = field(default_factory=list)  # the price spelt by the path to each node
    inner: list[bool] = field(default_factory=list)  # some longer price goes through it

    @staticmethod
    def build(encode_answer) -> "PriceTree":
        """`encode_answer(text) -> ids`. Raises ValueError where two prices are spelt alike or "." is not one token."""
        paths = {tuple(encode_answer(str(price))): price for price in range(PRICES)}
        end = encode_answer(".")
        if len(paths) < PRICES or () in paths or len(end) != 1:
            raise ValueError("the tokeniser does not spell every whole dollar from 0 to 999 in a way of its own")
        prefixes = sorted({path[:n] for path in paths for n in range(len(path) + 1)}, key=lambda p: (len(p), p))
        number = {prefix: i for i, prefix in enumerate(prefixes)}
        choices = sorted({token for path in paths for token in path} | set(end))
        tree = PriceTree(choices, choices.index(end[0]))
        through = {path[:n] for path in paths for n in range(len(path))}
        for prefix in prefixes:
            tree.parent.append(number[prefix[:-1]] if prefix else 0)
            tree.choice.append(choices.index(prefix[-1]) if prefix else 0)
            tree.price.append(paths.get(prefix))
            tree.inner.append(prefix in through)
            if prefix in through:
                if len(prefix) == len(tree.levels):
                    tree.levels.append([])
                tree.levels[len(prefix)].append(number[prefix])
        return tree

    def below(self) -> np.ndarray:
        """True where a price lies at or below a node  # (nodes, PRICES)"""
        table = np.zeros((len(self.parent), PRICES), dtype=bool)
        for node in range(len(self.parent) - 1, -1, -1):
            if self.price[node] is not None:
                table[node, self.price[node]] = True
            if node:
                table[self.parent[node]] |= table[node]
        return table


@torch.no_grad()
def price_distribution(prefill, extend, prompts: list[list[int]], tree: PriceTree, prune: float = 0.0) -> tuple:
    """P(price | prompt) (B, 1000) float64, rows summing to one, and the probability that the model names a price at all (B,).

    prefill(prompts, choices) -> natural log-probabilities (B, k), likeliest token (B,), cache
    extend(cache, tokens (B, n), parents (B, n), choices) -> log-probabilities (B, n, k), likeliest tokens (B, n)
    `prune` is the probability below which a node is not opened; 0 opens all.
    """
    choices = torch.tensor(tree.choices)
    first, _, cache = prefill(prompts, choices)
    rows, device = first.shape[0], first.device
    children = {n: [c for c in range(1, len(tree.parent)) if tree.parent[c] == n] for level in tree.levels for n in level}
    below = torch.from_numpy(tree.below()).double()  # (nodes, PRICES)
    mass = torch.zeros(rows, len(tree.parent), dtype=torch.float64)  # probability of arriving at each node
    mass[:, 0] = 1.0
    slot = torch.zeros(rows, len(tree.parent), dtype=torch.long)  # where a node stands in the cache; 0 is the prompt
    total = torch.zeros(rows, PRICES, dtype=torch.float64)
    used = 1
    for depth, level in enumerate(tree.levels):
        nodes = torch.tensor(level)
        if depth == 0:
            opened, picked = torch.ones(rows, 1, dtype=torch.bool), torch.zeros(rows, 1, dtype=torch.long)
            log_probs = first.double().cpu()[:, None]  # (B, 1, k)
        else:
            # Each row opens its own nodes, heaviest first; rows with fewer are filled up with nodes that are then ignored.
            weights = mass[:, nodes]  # (B, n)
            wanted = (weights >= prune).sum(1).max() if prune else len(level)
            order = weights.topk(int(wanted), dim=1).indices  # (B, n)
            picked, opened = nodes[order], weights.gather(1, order) >= prune
            shut = weights.scatter(1, order, torch.where(opened, 0.0, weights.gather(1, order)))
            total += (shut / below[nodes].sum(1)) @ below[nodes]
            if not int(wanted):
                break
            tokens = choices[torch.tensor(tree.choice)[picked]]  # (B, n)
            parents = slot.gather(1, torch.tensor(tree.parent)[picked])
            log_probs = extend(cache, tokens.to(device), parents.to(device), choices)[0].double().cpu()  # (B, n, k)
            slot.scatter_(1, picked, torch.arange(used, used + int(wanted)).expand(rows, -1))
            used += int(wanted)
        chance = mass.gather(1, picked)[:, :, None] * log_probs.exp() * opened[:, :, None]  # (B, n, k)
        for node in level:
            at = picked == node  # (B, n), at most one a row
            chance_here = (chance * at[:, :, None]).sum(1)  # (B, k)
            if tree.price[node] is not None:
                total[:, tree.price[node]] += chance_here[:, tree.end]
            for child in children[node]:
                mass[:, child] = chance_here[:, tree.choice[child]]
                if not tree.inner[child]:
                    total[:, tree.price[child]] += mass[:, child]
    named = total.sum(1, keepdim=True)
    if not torch.isfinite(named).all() or (named <= 0).any():
        raise ValueError("the model gives no finite probability to any price: its weights are damaged or it diverged")
    return (total / named).numpy(), named[:, 0].numpy()


@torch.no_grad()
def greedy_prices(prefill, extend, prompts: list[list[int]], tree: PriceTree) -> np.ndarray:
    """What generation at temperature 0 writes, in dollars; NaN where it writes no price  # (B,)"""
    choices = torch.tensor(tree.choices)
    token_of = torch.tensor(tree.choices)[torch.tensor(tree.choice)].tolist()
    child = {(tree.parent[n], token_of[n]): n for n in range(1, len(tree.parent))}
    _, top, cache = prefill(prompts, choices)
    node, done = [0] * len(prompts), [False] * len(prompts)
    slots = torch.zeros(len(prompts), 1, dtype=torch.long, device=top.device)
    for depth in range(len(tree.levels)):
        for row, token in enumerate(top.view(-1).tolist()):
            if not done[row]:
                following = child.get((node[row], token))
                done[row] = following is None  # "." or anything that spells no price
                node[row] = node[row] if following is None else following
                done[row] |= not tree.inner[node[row]]
        if all(done) or depth == len(tree.levels) - 1:
            break
        _, top = extend(cache, top.view(-1, 1), slots, choices)
        slots = slots + 1
    return np.array([np.nan if tree.price[n] is None else float(tree.price[n]) for n in node])


def pick(distribution: np.ndarray, how: str) -> np.ndarray:
    """One price a row, in dollars, from P (B, 1000): `median` (the least absolute error), `mean` or `mode`."""
    if how == "median":
        return quantile(distribution, 0.5)
    if how == "mean":
        return distribution @ np.arange(PRICES)
    if how == "mode":
        return distribution.argmax(axis=1).astype(float)
    raise ValueError(f"unknown decoding {how!r}; choose from {', '.join(PICKS)}")


def quantile(distribution: np.ndarray, q: float) -> np.ndarray:
    """The least whole price with at least the share q of the probability at or below it  # (B,) dollars"""
    reached = np.cumsum(distribution, axis=1) >= q - 1e-12
    return np.where(reached.any(axis=1), reached.argmax(axis=1), PRICES - 1).astype(float)
