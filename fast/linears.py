"""The quantised linear, written for speed: the same sums as quant/linear.py, in fewer and larger steps.

    python -m pytest tests/fast/test_linears.py     # equal to the readable linear, forward and backward
    python -m benchmarks.kernels                    # against copy speed and the matmul peak of the GPU

What differs from the readable path, and why it is faster:

  - q, k and v read the same x, so do gate and up. A `MergedLinear` lays their weights one below the other in one matrix
    and multiplies once: fewer, larger products.
  - All merged linears share one scratch matrix, the size of the largest. It is filled, multiplied and overwritten: the
    model in 16 bits never exists, and nothing is allocated.
  - On a GPU one kernel turns nested NF4 into bfloat16 in one pass (fast/nf4.py).
  - `keep` holds the dequantised matrix for good, where memory allows: the same numbers without the work.
  - The LoRA factors A of a merged linear lie one below the other too: one product x A^T for all, one for dL/dA. On a
    GPU these small products run beside the large one, on a second stream.
  - The factors of a whole model are cast to the compute dtype at once (`cast_factors`).

On a CPU, and for shapes that do not come in whole blocks, bitsandbytes dequantises, and the rest is the same.
With `--bits 8` forward multiplies integers (fast/int8.py); backward and `keep` are as above.
"""

from itertools import groupby

import torch
from torch import Tensor, nn

from fast.int8 import JoinedInt8
from fast.nf4 import JoinedNF4
from lora.optim import FlatParameter
from quant.int8 import LinearInt8
from quant.linear import Linear16


class SideStream:
    """`with SideStream(device) as side:` runs on a second stream what is not needed at once; `side.join()` waits.

    LoRA's products are small: beside the large one they cost next to nothing. On a CPU all of this does nothing.
    """

    streams: dict = {}  # main stream -> its side stream

    def __init__(self, device: torch.device):
        self.side = None
        if device.type == "cuda":
            self.main = torch.cuda.current_stream(device)
            if self.main not in self.streams:
                self.streams[self.main] = torch.cuda.Stream(device)
            self.side = self.streams[self.main]

    def __enter__(self):
        if self.side:
            self.side.wait_stream(self.main)  # its memory may be used again: all earlier work on it is done by then
            self.context = torch.cuda.stream(self.side)
            self.context.__enter__()
        return self

    def __exit__(self, *error):
        if self.side:
            self.context.__exit__(*error)

    def join(self) -> None:
        if self.side:
            self.main.wait_stream(self.side)


class MergedLinearFunction(torch.autograd.Function):
    """y = [x W_1^T + s_1 (x A_1^T) B_1^T, x W_2^T + ...], see quant/linear.py for each line of backward.

    x (N, I); A (R_1 + R_2 + ..., I) of the parts that have LoRA, or None, and their B (O_i, R_i) -> y (N, O)
    """

    @staticmethod
    def forward(ctx, merged, x, lora_A, *lora_Bs):
        ctx.merged = merged
        if lora_A is not None:
            with SideStream(x.device) as side:
                z = x @ lora_A.T  # (N, R)
        y = merged.multiply(x)  # (N, O)
        if lora_A is not None:
            side.join()
            for (rows, ranks, scaling), lora_B in zip(merged.slices, lora_Bs, strict=True):
                y[:, rows].addmm_(z[:, ranks], lora_B.T, alpha=scaling)
            ctx.save_for_backward(x, z, lora_A, *lora_Bs)
        return y

    @staticmethod
    def backward(ctx, g):
        merged, grad_x, grad_A, grad_Bs = ctx.merged, None, None, []
        saved = ctx.saved_tensors  # read once: under recomputation each reading would run the block again
        if saved:
            x, z, lora_A, *lora_Bs = saved
            with SideStream(g.device) as side:
                grad_z = torch.empty_like(z)
                for (rows, ranks, scaling), lora_B in zip(merged.slices, lora_Bs, strict=True):
                    torch.addmm(z[:, ranks], g[:, rows], lora_B, beta=0, alpha=scaling, out=grad_z[:, ranks])
                    grad_Bs.append(torch.addmm(lora_B, g[:, rows].T, z[:, ranks], beta=0, alpha=scaling))
                grad_A = grad_z.T @ x  # (R, I)
        if ctx.needs_input_grad[1]:
            grad_x = g @ merged.weight(g.dtype)  # (N, I)
        if saved:
            side.join()
            if grad_x is not None:
                grad_x.addmm_(grad_z, lora_A)
        return None, grad_x, grad_A, *grad_Bs


class Scratch:
    """One matrix for all merged linears of a model, in each dtype that asks for it: overwritten by each."""

    def __init__(self):
        self.size, self.rooms = 0, {}

    def view(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
        if dtype not in self.rooms:
            self.rooms[dtype] = torch.empty(self.size, dtype=dtype, device=device)
        return self.rooms[dtype][: shape[0] * shape[1]].view(shape)


class MergedLinear:
    """Linears of one input as one product. A callable, no module: the linears stay where they are and own the weights.

    `parts` are quant.linear.FrozenLinear, bare or inside a lora.layer.LoRALinear without dropout. `kernels`: whether
    Triton's may be used.
    """

    def __init__(self, parts: list[nn.Module], scratch: Scratch, kernels: bool):
        self.parts, self.scratch = parts, scratch
        self.bases = [getattr(part, "base", part) for part in parts]
        self.lora = [part for part in parts if hasattr(part, "lora_A")]
        self.shape = (sum(base.out_features for base in self.bases), self.bases[0].in_features)
        self.device = next(self.bases[0].buffers()).device
        scratch.size = max(scratch.size, self.shape[0] * self.shape[1])
        self.slices = []  # for each part with LoRA: its columns of y, its columns of z, its scaling
        row = rank = 0
        for part, base in zip(parts, self.bases, strict=True):
            if part in self.lora:
                self.slices.append((slice(row, row + base.out_features), slice(rank, rank + part.rank), part.scaling))
                rank += part.rank
            row += base.out_features
        self.kept: Tensor | None = None
        self.joined = JoinedNF4(self.bases) if kernels and JoinedNF4.fits(self.bases) else None
        if all(isinstance(base, LinearInt8) for base in self.bases):
            self.joined = JoinedInt8(self.bases, kernels)
        if all(isinstance(base, Linear16) for base in self.bases):
            # 16 bits already: one matrix from the start, of which the linears become views.
            self.kept = torch.cat([base.weight for base in self.bases]) if len(parts) > 1 else self.bases[0].weight
            for base, rows in zip(self.bases, self.kept.split([b.out_features for b in self.bases]), strict=True):
                base.weight = rows

    def multiply(self, x: Tensor) -> Tensor:
        """The frozen part, x W^T + b.  (N, I) -> (N, O)"""
        if isinstance(self.joined, JoinedInt8):
            return self.joined.multiply(x)
        return nn.functional.linear(x, self.weight(x.dtype), self.bias(x.dtype))

    def weight(self, dtype: torch.dtype) -> Tensor:
        """All weights, one below the other  # (O, I); overwritten by the next merged linear, unless kept"""
        if self.kept is not None and self.kept.dtype == dtype:
            return self.kept
        return self.fill(self.scratch.view(self.shape, dtype, self.device))

    def fill(self, weight: Tensor) -> Tensor:
        """Dequantise into `weight` (O, I)"""
        if self.joined is not None:
            return self.joined.dequantise_into(weight)
        for base, rows in zip(self.bases, weight.split([b.out_features for b in self.bases]), strict=True):
            rows.copy_(base.dequantise(weight.dtype))
        return weight

    def keep(self, dtype: torch.dtype) -> None:
        """Hold the dequantised matrix for good"""
        if self.kept is None:
            self.kept = self.fill(torch.empty(self.shape, dtype=dtype, device=self.device))

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        if all(base.bias is None for base in self.bases):
            return None
        zeros = (torch.zeros(b.out_features, dtype=dtype, device=self.device) for b in self.bases)
        return torch.cat([z if b.bias is None else b.bias.to(dtype) for b, z in zip(self.bases, zeros, strict=True)])

    def __call__(self, x: Tensor, factors: tuple[Tensor, ...] | None = None) -> Tensor:
        """(N, I) -> (N, O). `factors`: (A, B_1, B_2, ...) in the dtype of x, from `cast_factors`; else they are cast
        here."""
        if factors is None and self.lora:
            factors = (torch.cat([p.lora_A for p in self.lora]).to(x.dtype), *(p.lora_B.to(x.dtype) for p in self.lora))
        return MergedLinearFunction.apply(self, x, *(factors or (None,)))


def cast_factors(
    flat: FlatParameter, linears: list[MergedLinear], dtype: torch.dtype
) -> dict[MergedLinear, tuple[Tensor, ...]]:
    """Each merged linear's (A, B_1, B_2, ...) in `dtype`: one cast, and in backward one concatenation, for all.

    The A of a merged linear are neighbours in the flat vector and come as one matrix (R_1 + R_2 + ..., I). Raises
    ValueError where they are not.
    """
    merged_of = {part: merged for merged in linears for part in merged.lora}
    runs = [  # (merged linear, factor, its layers): each run is one piece of the vector
        (merged, factor, [layer for layer, _ in run])
        for (merged, factor, _), run in groupby(
            flat.order, key=lambda o: (merged_of[o[0]], o[1], None if o[1] == "lora_A" else o[0])
        )
    ]
    sizes = [sum(getattr(layer, factor).numel() for layer in run) for _, factor, run in runs]
    # The last piece is what is trained besides LoRA.
    *pieces, _ = flat.parameter.to(dtype).split([*sizes, len(flat.parameter) - sum(sizes)])
    collected = {merged: ([], []) for merged in linears if merged.lora}
    for (merged, factor, run), piece in zip(runs, pieces, strict=True):
        columns = getattr(run[0], factor).shape[1]
        collected[merged][factor == "lora_B"].append(piece.view(-1, columns))
    if any(len(lora_As) != 1 for lora_As, _ in collected.values()):
        raise ValueError("the factors A of a merged linear must be neighbours in the flat vector")
    return {merged: (lora_As[0], *lora_Bs) for merged, (lora_As, lora_Bs) in collected.items()}
