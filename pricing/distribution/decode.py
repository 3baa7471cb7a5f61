"""From a model to a probability for each whole dollar from 0 to 999, and from these to one price.

The model writes a price as tokens. Every price from 0 to 999 is a path in a tree of tokens; prices that begin alike
share the beginning of their paths:

    digit by digit (SmolLM2):   $ -> 1 -> 2 -> 3      100 inner nodes: the prompt, 1 to 9, and 10 to 99
    one token each (Llama 3):   $ -> 123              1 inner node: the prompt, so one forward is all

P(price) is the product of the model's probabilities along its path. A path that is the beginning of another one ("12"
of "123") ends with the "." of "12.00"; any other ("123") ends by itself. Then no path is the beginning of another, the
events exclude each other, and dividing by their sum gives the exact distribution of the price, given that the model
writes one.

A node whose probability is less than the share `prune` of all that may still become a price is not opened: its
probability is spread evenly over the prices below it. The sum stays one, and no price's probability changes by more
than about the probability of the nodes that were not opened, as a share of that of all prices.

The guess is chosen for the error that is measured (Lukasik et al. 2024, arXiv 2403.04182): the median has the least
expected absolute error, the mean the least squared error, the log-mean the least squared error of the log price (that
is RMSLE without its 1 +); the mode is the likeliest price. `greedy` is what text generation at temperature 0 would
write: one digit after the other, each the likeliest, without a look at what comes after. Where the run has a price
head, the guess is half way between this median and the head's, in log price (pipeline/prediction.py).
"""

from dataclasses import dataclass

import numpy as np
import torch

PRICES = 1000  # 0..999 dollars
PRUNE = 1e-3  # for the calibration set in training, and the default in pricing
PICKS = ("median", "mean", "log-mean", "mode", "greedy")


@dataclass
class PriceTree:
    """The token paths of all prices. Node 0 is the prompt, each leaf is one price; nodes are sorted by depth."""

    choices: list[int]  # the token ids that lead from any node to another  (k,)
    levels: list[list[int]]  # inner nodes by depth
    parent: list[int]  # the node before each node
    choice: list[int]  # index in choices of the token that leads to each node
    leaf: list[int | None]  # the price at a leaf, None at an inner node
    spelt: list[int | None]  # the price that the tokens up to a node spell, ended or not
    number: dict[tuple[int, ...], int]  # path of token ids -> node
    goes_on: set[int]  # token ids after which a number is another one: digits, and commas ("1,000" is not 1)

    @staticmethod
    def build(encode_answer) -> "PriceTree":
        """The tree of a tokeniser, given as `encode_answer(text) -> ids`. Raises ValueError where two prices have the
        same ids, "." is not one token, or "12.00" is not the ids of "12", of "." and more."""
        spelling = {price: tuple(encode_answer(str(price))) for price in range(PRICES)}
        price_of = {path: price for price, path in spelling.items()}
        end = tuple(encode_answer("."))
        if len(price_of) < PRICES or () in price_of or len(end) != 1:
            raise ValueError("prices cannot be scored: the tokeniser gives two of them the same ids, or splits a dot")
        begins = {path[:n] for path in price_of for n in range(len(path))}  # of some longer price
        paths = {path + end if path in begins else path: price for path, price in price_of.items()}
        inner = {path[:n] for path in paths for n in range(len(path))}
        nodes = sorted(inner | set(paths), key=lambda path: (len(path), path))
        number = {path: node for node, path in enumerate(nodes)}
        choices = sorted({token for path in paths for token in path})
        # The answers of training must follow the tree: "12.00" goes through 1, 2 and ".", not through one token ".00".
        for path, price in paths.items():
            if tuple(encode_answer(f"{price}.00"))[: len(path)] != path:
                raise ValueError(f'prices cannot be scored: the ids of "{price}.00" do not begin with "{price}", "."')
        depths, numbers = range(max(map(len, paths))), list(map(str, range(PRICES)))
        commas = [f",{number}" for number in numbers]
        return PriceTree(
            choices=choices,
            levels=[[number[p] for p in nodes if p in inner and len(p) == depth] for depth in depths],
            parent=[number[p[:-1]] if p else 0 for p in nodes],
            choice=[choices.index(p[-1]) if p else 0 for p in nodes],
            leaf=[paths.get(p) for p in nodes],
            spelt=[price_of.get(p, paths.get(p)) for p in nodes],
            number=number,
            goes_on={encode_answer(text)[0] for text in (*numbers, "00", "000", ",", *commas, ",00", ",000")},
        )

    def below(self) -> torch.Tensor:
        """1 where the price is at the node or below it, else 0  # (nodes, PRICES) float64"""
        table = torch.zeros(len(self.parent), PRICES, dtype=torch.float64)
        for node in range(len(self.parent) - 1, -1, -1):
            if self.leaf[node] is not None:
                table[node, self.leaf[node]] = 1
            if node:
                table[self.parent[node]] += table[node]
        return table


@torch.no_grad()
def price_distribution(prefill, extend, prompts: list[list[int]], tree: PriceTree, prune: float = 0.0) -> tuple:
    """(P(price | prompt) (B, 1000) float64, rows summing to one; the probability that the model writes a price (B,)).

    prefill(prompts, choices) -> natural log-probabilities (B, k), likeliest token (B,), cache
    extend(cache, tokens (B, n), parents (B, n), choices) -> log-probabilities (B, n, k), likeliest tokens (B, n)
    `prune`: nodes of less than this share of what may still become a price are not opened; 0 opens all. Raises
    ValueError where the probabilities are not finite or all 0.
    """
    choices, choice, parent = torch.tensor(tree.choices), torch.tensor(tree.choice), torch.tensor(tree.parent)
    first, _, cache = prefill(prompts, choices)
    rows, device = first.shape[0], first.device
    below = tree.below()
    mass = torch.zeros(rows, len(tree.parent), dtype=torch.float64)  # probability of reaching each node
    mass[:, 0] = 1.0
    slot = torch.zeros(rows, len(tree.parent), dtype=torch.long)  # a node's place in the cache; 0 is the prompt
    total = torch.zeros(rows, PRICES, dtype=torch.float64)
    used = 1
    for depth, level in enumerate(tree.levels):
        nodes = torch.tensor(level)
        weights = mass[:, nodes]  # (B, n)
        opened = weights >= prune * (total.sum(1, keepdim=True) + weights.sum(1, keepdim=True))
        total += (weights * ~opened / below[nodes].sum(1)) @ below[nodes]  # spread evenly over the prices below
        # Each row opens its own nodes, the likeliest first. Rows with fewer are filled up; those results are ignored.
        width = int(opened.sum(1).max())
        if not width:
            break
        order = weights.topk(width, dim=1).indices  # (B, width)
        if depth == 0:
            log_probs = first[:, None]  # (B, 1, k)
        else:
            picked = nodes[order]
            tokens, parents = choices[choice[picked]], slot.gather(1, parent[picked])
            log_probs, _ = extend(cache, tokens.to(device), parents.to(device), choices)  # (B, width, k)
            slot.scatter_(1, picked, torch.arange(used, used + width).expand(rows, -1))
            used += width
        chance = torch.zeros(rows, len(level), len(tree.choices), dtype=torch.float64)
        chance.scatter_(1, order[:, :, None].expand(-1, -1, len(tree.choices)), log_probs.double().exp().cpu())
        chance *= (weights * opened)[:, :, None]  # (B, n, k): reaching a node, then writing a token
        opening = set(level)
        children = torch.tensor([node for node in range(1, len(tree.parent)) if tree.parent[node] in opening])
        mass[:, children] = chance[:, torch.searchsorted(nodes, parent[children]), choice[children]]
        leaves = [node for node in children.tolist() if tree.leaf[node] is not None]
        total[:, [tree.leaf[node] for node in leaves]] += mass[:, leaves]
    named = total.sum(1, keepdim=True)
    if not torch.isfinite(named).all() or (named <= 0).any():
        raise ValueError("the model gives no finite probability to any price: its weights are damaged or it diverged")
    return (total / named).numpy(), named[:, 0].numpy()


@torch.no_grad()
def greedy_prices(prefill, extend, prompts: list[list[int]], tree: PriceTree) -> np.ndarray:
    """What text generation at temperature 0 writes; NaN where that is not a price from 0 to 999, as "1,000" and "1000"
    are not  # (B,) dollars

    `prefill` and `extend` as for price_distribution."""
    choices = torch.tensor(tree.choices)
    child = {(tree.parent[n], tree.choices[tree.choice[n]]): n for n in range(1, len(tree.parent))}
    _, top, cache = prefill(prompts, choices)
    node, done, price = [0] * len(prompts), [False] * len(prompts), [np.nan] * len(prompts)
    slots = torch.zeros(len(prompts), 1, dtype=torch.long, device=top.device)
    for depth in range(len(tree.levels) + 1):  # the token behind a price is looked at, too
        for row, token in enumerate(top.view(-1).tolist()):
            before, following = node[row], child.get((node[row], token))
            if done[row]:
                continue
            if following is not None:
                node[row] = following
                done[row] = tree.spelt[following] is not None and tree.spelt[before] == tree.spelt[following]  # by "."
            else:
                done[row] = True
            if done[row] and tree.spelt[before] is not None and token not in tree.goes_on:
                price[row] = float(tree.spelt[before])
        if all(done) or depth == len(tree.levels):
            break
        _, top = extend(cache, top.view(-1, 1), slots, choices)
        slots = slots + 1
    return np.array(price)


def pick(distribution: np.ndarray, how: str) -> np.ndarray:
    """One price a row of P (B, 1000): its `mean`, `log-mean` (exp of the mean of ln max(d, 0.5)) or `mode`.  ->
    (B,) dollars. The median is the middle one of intervals.log_quantiles. Raises ValueError for another `how`."""
    if how == "mean":
        return distribution @ np.arange(PRICES)
    if how == "log-mean":
        return np.exp(distribution @ np.log(np.maximum(np.arange(PRICES), 0.5)))
    if how == "mode":
        return distribution.argmax(axis=1).astype(float)
    raise ValueError(f"unknown way {how!r} to pick from a distribution; choose mean, log-mean or mode")
