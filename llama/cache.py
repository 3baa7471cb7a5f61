"""The KV cache as a tree: keys and values of prompts, and of the tokens grown on them.

Scoring prices asks many short continuations of one prompt ("1", "12", "123", ...). A `KVCache` holds the prompt's
keys and values once, and `grow` adds tokens as a tree: each new token sees the prompt, its ancestors and itself.
Ordinary token by token decoding is the tree without branches. What all prompts begin with is a cache of its own,
read once and shared by all rows.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from llama.attention import Layout


class KVCache:
    """Keys and values of B prompts and of the tree of tokens grown on them."""

    def __init__(
        self, lengths: list[int], layers: int, device: torch.device | str, prefix: "KVCache | None" = None
    ):
        """`prefix` is the cache of one sequence that comes before every prompt: read once, shared by all rows."""
        self.keys: list[Tensor | None] = [None] * layers  # each (B, S, K, D), rotated
        self.values: list[Tensor | None] = [None] * layers
        self.layout = Layout.packed(lengths, device)  # of the tokens being added; first the prompts themselves
        columns = torch.arange(max(lengths), device=device)
        self.lengths = torch.tensor(lengths, device=device)  # (B,) tokens, with those of the prefix
        prompt = columns < self.lengths[:, None]
        if prefix is not None:
            before = prefix.keys[0].shape[1]
            self.lengths = self.lengths + before
            self.keys = [k.expand(len(lengths), -1, -1, -1) for k in prefix.keys]
            self.values = [v.expand(len(lengths), -1, -1, -1) for v in prefix.values]
            prompt = F.pad(prompt, (before, 0), value=True)
            self.layout.positions = self.layout.positions + before
            # Row t of the grid sees the prefix and columns 0 to t; (1, 1, T, S), the same for every prompt.
            slots = torch.arange(before + len(columns), device=device)
            self.layout.mask = (columns[:, None] + before >= slots)[None, None]
            self.layout.slot_positions = slots[None]
        self.layout.lengths = self.lengths.repeat_interleave(torch.tensor(lengths, device=device))
        # Prompts begin at slot 0, or after the prefix: a slot is a position. Tree tokens add their own.
        self.slot_positions = torch.arange(prompt.shape[1], device=device).expand(len(lengths), -1)
        self.sees = prompt[:, None, :]  # (B, 1 + tree nodes, S) bool: what each node may look at; node 0 is the prompt

    def grow(self, parents: Tensor) -> None:
        """Make room for n new nodes a row. parents (B, n): 0 for the prompt, i for the i-th node added after it."""
        rows, new = parents.shape
        nodes, slots = self.sees.shape[1:]
        sees = F.pad(self.sees, (0, new))  # (B, nodes, S + n)
        of_parent = sees.gather(1, parents[:, :, None].expand(-1, -1, slots + new))  # (B, n, S + n)
        itself = torch.zeros(new, slots + new, dtype=torch.bool, device=parents.device)
        itself[:, slots:].fill_diagonal_(True)
        added = of_parent | itself
        self.sees = torch.cat([sees, added], dim=1)
        # A token's position is the number of tokens that it sees before itself.
        positions = added.sum(-1) - 1  # (B, n)
        self.slot_positions = torch.cat([self.slot_positions, positions], dim=1)
        self.layout = Layout(
            positions.view(-1), rows, new, None, mask=added[:, None],
            lengths=self.lengths.repeat_interleave(new), slot_positions=self.slot_positions,
        )  # fmt: skip

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, K, D) new keys and values -> all so far (B, S, K, D)"""
        if self.keys[layer] is not None:
            k, v = torch.cat([self.keys[layer], k], dim=1), torch.cat([self.values[layer], v], dim=1)
        self.keys[layer], self.values[layer] = k, v
        return k, v
