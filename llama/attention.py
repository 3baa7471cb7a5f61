"""Who sees whom: packed sequences, and attention itself. The cache that grows on them is in cache.py.

The network works on N packed tokens, one sequence after another without padding: every linear, norm and MLP then does
useful work only. Attention alone needs to know where a sequence begins. It lays q, k and v out on a grid of B rows and
T columns (a row a sequence, the tail unused), attends within each row, and packs the result again:

    packed (N):   a0 a1 a2 b0 b1 c0 c1 c2        grid (B, T):   a0 a1 a2
                                                                b0 b1 --
                                                                c0 c1 c2

Rows never meet, so packing cannot leak one item into another; and with a causal mask, an unused tail is never seen by
a real token before it, so no padding mask is needed. A batch padded on the right is the special case of equal lengths.
The fast path on a GPU needs no grid: fast/attention.py takes the packed rows and the indices where sequences begin.
Both give the same numbers up to rounding; tests hold them together.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Layout:
    """Where each of N tokens stands."""

    positions: Tensor  # (N,) rope position within its own sequence, from 0
    rows: int  # B
    columns: int  # T, the longest sequence
    slots: Tensor | None  # (N,) row * T + column of each token; None when the grid is full and packing is a reshape
    mask: Tensor | None = None  # (B, 1, T, S) bool, True where seen; None: causal within the row
    last: Tensor | None = None  # (B,) packed index of each sequence's last token
    edges: Tensor | None = None  # (B + 1,) int32 packed index where each sequence begins, and N; None: use the grid
    lengths: Tensor | None = None  # (N,) tokens of each token's prompt, where a cache knows better than `edges`
    slot_positions: Tensor | None = None  # (B or 1, S) rope position of what `mask` shows

    @staticmethod
    def packed(lengths: list[int], device: torch.device | str = "cpu") -> "Layout":
        """Sequences of `lengths` tokens, one after another. All lengths >= 1."""
        columns = max(lengths)
        length = torch.tensor(lengths)
        ends = length.cumsum(0)  # (B,)
        positions = torch.arange(int(ends[-1])) - (ends - length).repeat_interleave(length)
        slots = None
        if min(lengths) < columns:
            slots = (torch.arange(len(lengths)) * columns).repeat_interleave(length) + positions
            slots = slots.to(device)
        edges = F.pad(ends, (1, 0)).to(torch.int32)
        return Layout(
            positions.to(device), len(lengths), columns, slots, last=(ends - 1).to(device), edges=edges.to(device)
        )

    def sequence_lengths(self) -> Tensor:
        """How many tokens each token's sequence has  # (N,)"""
        if self.lengths is not None:
            return self.lengths
        index = torch.arange(len(self.positions), device=self.positions.device, dtype=self.edges.dtype)
        # right=True skips sequences without tokens; a batch's unused tail counts as the last sequence, harmlessly.
        sequence = torch.searchsorted(self.edges, index, right=True).clamp(max=len(self.edges) - 1) - 1
        return self.edges.diff()[sequence]

    def seen(self, window: int | None) -> Tensor | None:
        """`mask`, narrowed to the last `window` tokens, the querying one included  # (B or 1, 1, T, S), None: causal"""
        longest = self.columns if self.mask is None else self.mask.shape[-1]
        if window is None or window >= longest:
            return self.mask
        if self.mask is None:
            column = torch.arange(self.columns, device=self.positions.device)
            distance = column[:, None] - column  # (T, S)
            return ((distance >= 0) & (distance < window))[None, None]
        position = self.to_grid(self.positions[:, None])[..., 0]  # (B, T); distances go by position, not by slot
        return self.mask & (position[:, None, :, None] - self.slot_positions[:, None, None] < window)

    def to_grid(self, x: Tensor) -> Tensor:
        """(N, heads, D) -> (B, T, heads, D), zeros where no token stands"""
        if self.slots is not None:
            x = x.new_zeros(self.rows * self.columns, *x.shape[1:]).index_copy(0, self.slots, x)
        return x.view(self.rows, self.columns, *x.shape[1:])

    def to_packed(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (N, C)"""
        x = x.reshape(self.rows * self.columns, -1)
        return x if self.slots is None else x.index_select(0, self.slots)


@dataclass(frozen=True)
class Scores:
    """How a layer's scores come about, where it is not q k^T / sqrt(D) over all that came before"""

    scale: float | None = None  # in place of D^-0.5
    softcap: float | None = None  # s -> cap * tanh(s / cap), before the mask (Gemma 2, arXiv 2408.00118)
    window: int | None = None  # a token sees so many, itself included (Mistral 7B, arXiv 2310.06825)


def capped_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float) -> Tensor:
    """softmax(cap * tanh(q k^T * scale / cap)) v, in float32.  q (B, H, T, D), k and v (B, K, S, D) -> (B, H, T, D)

    PyTorch's own attention has no soft cap; here the scores exist, (B, H, T, S) of them.
    """
    if mask is None:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()[None, None]
    q = q.float().unflatten(1, (k.shape[1], -1))  # (B, K, H / K, T, D)
    k, v = k.float()[:, :, None], v.float()[:, :, None]  # (B, K, 1, S, D)
    scores = softcap * torch.tanh(q @ k.transpose(-1, -2) * (scale / softcap))  # (B, K, H / K, T, S)
    return (scores.masked_fill(~mask[:, :, None], float("-inf")).softmax(-1) @ v).flatten(1, 2)


def attend(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, cache=None, layer: int = 0, scores: Scores = Scores()
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v within each sequence, or as `scores` says.  q (N, H, D), k, v (N, K, D) -> (N, H * D)

    `cache` is a llama.cache.KVCache: k and v of `layer` are added to it, and the queries see all that it holds.
    Grouped queries: head h reads key-value head h // (H / K),
    that is [K1, K2] -> [K1, K1, K2, K2], not [K1, K2, K1, K2].
    """
    q, k, v = (layout.to_grid(t) for t in (q, k, v))  # (B, T, heads, D)
    if cache is not None:
        k, v = cache.append(layer, k, v)  # (B, S, K, D)
    dtype = v.dtype
    if q.device.type == "cpu":
        q, k, v = q.float(), k.float(), v.float()  # the CPU kernel's backward is slow in bfloat16
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, heads, T, D)
    mask, scale = layout.seen(scores.window), scores.scale or q.shape[-1] ** -0.5
    if scores.softcap:
        y = capped_attention(q, k, v, mask, scale, scores.softcap)
    else:
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scale, enable_gqa=True)
    return layout.to_packed(y.transpose(1, 2)).to(dtype)  # (N, H * D)
