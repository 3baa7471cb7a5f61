"""From a model to a probability for each whole dollar from 0 to 999, and from there to one price.

The model writes a price as tokens. Every price 0..999 is a path in a tree of tokens, shared from the front:

    digit by digit (SmolLM2):   $ -> 1 -> 2 -> 3      100 inner nodes: the prompt, 1 to 9, and 10 to 99
    one token each (Llama 3):   $ -> 123              1 inner node: the prompt, so one forward is all

P(price) is the product of the model's probabilities along its path. A path that goes on in another price ("12" in
"123") ends with the "." of "12.00"; one that does not ("123") ends by itself. No price is then the beginning of
another, so the events exclude each other, and dividing by their sum gives the exact distribution of the price, given
that the model names one.

A node that holds less than the share `prune` of what may still name a price is not opened: what it holds is spread
evenly over the prices below it. Nothing is lost, the sum stays one, and no price moves by more than about what the shut
nodes held, as a share of what names a price.

From the distribution, the price is chosen for the error that is measured (Lukasik et al. 2024, arXiv 2403.04182): the
median has the least expected absolute error, the mean the least squared error, the log-mean the least squared error of
the log price (RMSLE, but for its 1 +); the mode is the likeliest. `greedy` is what text generation at temperature 0
would write: digit after digit, each the likeliest, blind to what comes after.
"""

from dataclasses import dataclass

import numpy as np
import torch

PRICES = 1000  # 0..999 dollars
PRUNE = 1e-3  # what training calibrates by, and pricing goes by unless told
PICKS = ("median", "mean", "log-mean", "mode", "greedy")


@dataclass
class PriceTree:
    """The token paths of all prices. Node 0 is the prompt, inner nodes go on, each leaf is one price."""

    choices: list[int]  # token ids that ever lead from a node to another  (k,)
    levels: list[list[int]]  # inner nodes by depth
    parent: list[int]  # the node before each node
    choice: list[int]  # index in choices of the token that leads to each node
    leaf: list[int | None]  # the price at a leaf, None at an inner node
    spelt: list[int | None]  # the price that the tokens up to a node spell, ended or not
    number: dict[tuple[int, ...], int]  # path of token ids -> node

    @staticmethod
    def build(encode_answer) -> "PriceTree":
        """`encode_answer(text) -> ids`. Raises ValueError where two prices are spelt alike or "." is not one token."""
        spelling = {price: tuple(encode_answer(str(price))) for price in range(PRICES)}
        price_of = {path: price for price, path in spelling.items()}
        end = tuple(encode_answer("."))
        if len(price_of) < PRICES or () in price_of or len(end) != 1:
            raise ValueError("the tokeniser does not spell every whole dollar from 0 to 999 in a way of its own")
        begins = {path[:n] for path in price_of for n in range(len(path))}  # of some longer price
        paths = {path + end if path in begins else path: price for path, price in price_of.items()}
        inner = {path[:n] for path in paths for n in range(len(path))}
        nodes = sorted(inner | set(paths), key=lambda path: (len(path), path))
        number = {path: node for node, path in enumerate(nodes)}
        choices = sorted({token for path in paths for token in path})
        # What training writes must run along the tree: "12.00" through 1, 2 and ".", with no ".00" in one piece.
        for path, price in paths.items():
            if tuple(encode_answer(f"{price}.00"))[: len(path)] != path:
                raise ValueError(f'the tokeniser spells "{price}.00" unlike "{price}" and "."; prices cannot be scored')
        depths = range(max(map(len, paths)))
        return PriceTree(
            choices=choices,
            levels=[[number[p] for p in nodes if p in inner and len(p) == depth] for depth in depths],
            parent=[number[p[:-1]] if p else 0 for p in nodes],
            choice=[choices.index(p[-1]) if p else 0 for p in nodes],
            leaf=[paths.get(p) for p in nodes],
            spelt=[price_of.get(p, paths.get(p)) for p in nodes],
            number=number,
        )

    def below(self) -> torch.Tensor:
        """1 where a price lies at or below a node  # (nodes, PRICES) float64"""
        table = torch.zeros(len(self.parent), PRICES, dtype=torch.float64)
        for node in range(len(self.parent) - 1, -1, -1):
            if self.leaf[node] is not None:
                table[node, self.leaf[node]] = 1
            if node:
                table[self.parent[node]] += table[node]
        return table


@torch.no_grad()
def price_distribution(prefill, extend, prompts: list[list[int]], tree: PriceTree, prune: float = 0.0) -> tuple:
    """P(price | prompt) (B, 1000) float64, rows summing to one, and the probability that the model names a price at
    all (B,).

    prefill(prompts, choices) -> natural log-probabilities (B, k), likeliest token (B,), cache
    extend(cache, tokens (B, n), parents (B, n), choices) -> log-probabilities (B, n, k), likeliest tokens (B, n)
    `prune` is the share of what may still name a price below which a node is not opened; 0 opens all.
    """
    choices, choice, parent = torch.tensor(tree.choices), torch.tensor(tree.choice), torch.tensor(tree.parent)
    first, _, cache = prefill(prompts, choices)
    rows, device = first.shape[0], first.device
    below = tree.below()
    mass = torch.zeros(rows, len(tree.parent), dtype=torch.float64)  # probability of arriving at each node
    mass[:, 0] = 1.0
    slot = torch.zeros(rows, len(tree.parent), dtype=torch.long)  # where a node stands in the cache; 0 is the prompt
    total = torch.zeros(rows, PRICES, dtype=torch.float64)
    used = 1
    for depth, level in enumerate(tree.levels):
        nodes = torch.tensor(level)
        weights = mass[:, nodes]  # (B, n)
        opened = weights >= prune * (total.sum(1, keepdim=True) + weights.sum(1, keepdim=True))
        total += (weights * ~opened / below[nodes].sum(1)) @ below[nodes]  # shared evenly among the prices below
        # Each row opens its own nodes, heaviest first; a row with fewer is filled up with nodes that are then ignored.
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
        chance *= (weights * opened)[:, :, None]  # (B, n, k): arriving at a node, then writing a token
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
    """What generation at temperature 0 writes, in dollars; NaN where it writes no price  # (B,)"""
    choices = torch.tensor(tree.choices)
    child = {(tree.parent[n], tree.choices[tree.choice[n]]): n for n in range(1, len(tree.parent))}
    _, top, cache = prefill(prompts, choices)
    node, done = [0] * len(prompts), [False] * len(prompts)
    slots = torch.zeros(len(prompts), 1, dtype=torch.long, device=top.device)
    for depth in range(len(tree.levels)):
        for row, token in enumerate(top.view(-1).tolist()):
            if not done[row]:
                following = child.get((node[row], token))
                done[row] = following is None  # "." or anything that spells no price
                node[row] = node[row] if following is None else following
                done[row] |= tree.leaf[node[row]] is not None
        if all(done) or depth == len(tree.levels) - 1:
            break
        _, top = extend(cache, top.view(-1, 1), slots, choices)
        slots = slots + 1
    return np.array([np.nan if tree.spelt[n] is None else float(tree.spelt[n]) for n in node])


def pick(distribution: np.ndarray, how: str) -> np.ndarray:
    """One price a row, in dollars, from P (B, 1000): `mean`, `log-mean` (exp of the mean of ln max(d, 0.5)) or `mode`.
    The median is pricing.intervals.log_quantiles' middle one."""
    if how == "mean":
        return distribution @ np.arange(PRICES)
    if how == "log-mean":
        return np.exp(distribution @ np.log(np.maximum(np.arange(PRICES), 0.5)))
    if how == "mode":
        return distribution.argmax(axis=1).astype(float)
    raise ValueError(f"unknown way {how!r} to pick from a distribution; choose mean, log-mean or mode")
