"""How far a distribution over whole dollars is from the price, as a loss: the CRPS, at each step of a price's path.

    python train.py --bits 4 --loss crps --crps-weight 2          python -m pytest tests/test_loss.py

The continuous ranked probability score (Gneiting and Raftery 2007, doi.org/10.1198/016214506000001437, equation 20)
of a distribution over whole dollars, F its cumulative sum, is

    CRPS(F, y) = sum_d w(d) (F(d) - 1[d >= y])^2,      w(d) = x(d + 1) - x(d)

with x(d) = d (`dollars`) or x(d) = ln max(d, 0.5) (`log`; 0 dollars, which is 0.50 on, stands at 0.50). A forecast of
one sure price a has the score |x(a) - x(y)|: the absolute error, in dollars or in ln price. Least, in expectation, at
the true distribution, and 0 only where all is on y.

One token a price: F is known from one position, and this is what is computed, exactly. Digit by digit, teacher forcing
gives logits along the true path alone: at its node s, the chance p_s(c) of each next token c, given that one of them
follows, but not what the model would write after a wrong c. So each step is scored by itself. Let U_c spread a mass
evenly over the prices below c (as decode.py shares out a node that it does not open), U_c(d) its cumulative sum, and
c* the true token; F_s = sum_c p_s(c) U_c is what the step forecasts, and U_c* is all that it can know of the truth:

    path CRPS = sum_s sum_d w(d) (F_s(d) - U_c*(d))^2 = sum_s sum_d w(d) (sum_c (p_s(c) - 1[c = c*]) U_c(d))^2

Exact: every p_s(c), and with one step the whole. Approximated: the distance of two branches, taken between their
even spreads, and the sum, which is not the CRPS of the whole distribution: a step counts in full though the model may
have thought it unlikely to be reached (as in cross-entropy). What this form keeps, and why it was chosen: it is a
strictly proper score. The expectation of step s is sum_d w(d) (sum_c (p_s(c) - h_s(c)) U_c(d))^2 + what no forecast
changes, h_s being the true chances, so it is least at p_s = h_s whatever lies inside the branches. The CRPS of the
whole distribution with only the true path opened, though nearer in form, has not this property: its coarsening depends
on y, and inside a branch of chance p < 1 it rewards crowding to the middle (tests/test_loss.py holds both to it).
For simulated log-normal forecasts of digit-spelt prices it correlates with the CRPS of the whole distribution by 0.8
and is 1.2 times as large in ln price; in dollars by only 0.3 to 0.4, and 2.4 times: so `log` is the default.

Chances are taken given that a price goes on: what is lost to other tokens is the cross-entropy's to mend.
"""

import torch
from torch import Tensor

from pricing.distribution.decode import PRICES, PriceTree

CRPS_SCALES = ("log", "dollars")


def crps_weights(scale: str) -> Tensor:
    """w(d) = x(d + 1) - x(d), in dollars or in ln price; the last is 0, as every F has reached 1 there
    # (PRICES,) float64"""
    x = torch.arange(PRICES, dtype=torch.float64)
    if scale == "log":
        x = x.clamp(min=0.5).log()
    elif scale != "dollars":
        raise ValueError(f"unknown scale {scale!r} of the CRPS; choose from {', '.join(CRPS_SCALES)}")
    return torch.cat([x.diff(), x.new_zeros(1)])


class PathCRPS:
    """The path CRPS (above) as tables by node, one row more for positions that choose no price, and the gathers that
    score by them. Besides the tables (nodes, PRICES), memory is a few arrays (M, PRICES) of the logits' type."""

    def __init__(self, tree: PriceTree, scale: str, device: torch.device | str):
        nodes, k, below = len(tree.parent), len(tree.choices), tree.below()
        inner = [node for node in range(nodes) if tree.leaf[node] is None]
        self.row = {node: row for row, node in enumerate(inner)}  # of an inner node
        self.nowhere = len(inner)
        allowed = torch.zeros(len(inner) + 1, k, dtype=torch.bool)  # may this choice follow?
        allowed[-1] = True
        owner = torch.zeros(len(inner) + 1, PRICES, dtype=torch.long)  # the choice that a price lies below
        size = torch.full((len(inner) + 1, PRICES), torch.inf)  # the prices that share its mass; inf: none of it
        for node in range(1, nodes):
            row, prices = self.row[tree.parent[node]], below[node].bool()
            allowed[row, tree.choice[node]] = True
            owner[row, prices] = tree.choice[node]
            size[row, prices] = prices.sum().float()
        self.allowed, self.owner, self.size = (table.to(device) for table in (allowed, owner, size))
        self.weights = crps_weights(scale).to(device)
        self.k = torch.arange(k, device=device)

    def __call__(self, logits: Tensor, rows: Tensor, taken: Tensor) -> Tensor:
        """Logits of the choices (M, k), rows of the tables (M,), index of the true choice (M,) -> sum over M, ()"""
        chances = logits.masked_fill(~self.allowed[rows], -torch.inf).softmax(dim=1)  # (M, k)
        excess = chances - (self.k == taken[:, None]).to(logits.dtype)  # p_s(c) - 1[c = c*]
        # Mass by price, then the cumulative sum; no (M, k, PRICES) is ever made.
        reached = (excess.gather(1, self.owner[rows]) / self.size[rows]).cumsum(dim=1)  # (M, PRICES)
        return (reached.square() @ self.weights.to(logits.dtype)).sum()
