"""The quantised linear once more, for speed: the same sums as quant/linear.py, in fewer and larger steps.

    python -m pytest tests/test_fused.py       # equal to the readable linear, forward and backward
    python -m benchmarks.kernels               # against copy speed and the matmul peak of the GPU

What differs from the readable path, and why it is faster:

  - q, k and v read the same x, so do gate and up. A `Group` lays their weights one below the other in one matrix and
    multiplies once: fewer, larger products.
  - All groups share one scratch matrix, the size of the largest. It is filled, multiplied and overwritten: the model
    in 16 bits never exists, and nothing is allocated.
  - A Triton kernel turns nested NF4 into bfloat16 in one pass, reading 0.52 and writing 2 bytes a weight, where
    bitsandbytes' needs a pass of its own for absmax. Every bit is the same (enable_fp_fusion=False: a fused
    multiply-add would round once where the definition rounds twice).
  - `keep` holds a group's dequantised matrix for good, where memory allows: the same numbers without the work.
  - The LoRA factors A of a group lie one below the other too: one product x A^T for all, one for dL/dA. On a GPU these
    small products run beside the large one, on a second stream.

On a CPU, and for shapes that do not come in whole blocks, bitsandbytes dequantises, and the rest is the same.
With `--bits 8` forward multiplies integers (quant/fast_int8.py); backward and `keep` are as above.
"""

import os
import shutil

import torch
from torch import Tensor, nn

from fast.int8 import JoinedInt8
from quant.linear import FrozenLinear, Linear16, LinearInt8, LinearNF4

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None


if triton is not None:

    @triton.jit
    def nf4_kernel(
        packed, absmax, code_of_absmax, absmax_of_absmax, offset, code, out, n,
        HALF: tl.constexpr, NESTED: tl.constexpr, BLOCKS: tl.constexpr,
    ):  # fmt: skip
        block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)  # of 2 * HALF weights that share one absmax
        start = block.to(tl.int64) * HALF  # bytes
        scale = tl.load(absmax + block, mask=start * 2 < n, other=0)
        if NESTED:  # quant/nf4.py: absmax = dynamic_map[u8] * absmax_absmax + offset
            scale = tl.load(code_of_absmax + scale) * tl.load(absmax_of_absmax + block // 256, mask=start * 2 < n)
            scale += tl.load(offset + block // 256, mask=start * 2 < n)
        at = start[:, None] + tl.arange(0, HALF)[None, :]
        byte = tl.load(packed + at, mask=at * 2 < n, other=0)
        value = tl.interleave(tl.load(code + (byte >> 4)), tl.load(code + (byte & 15))) * scale[:, None]
        to = 2 * start[:, None] + tl.arange(0, 2 * HALF)[None, :]
        tl.store(out + to, value.to(out.dtype.element_ty), mask=to < n)

    @triton.jit
    def rows_kernel(tokens, table, out, size, BLOCK: tl.constexpr):
        token = tl.load(tokens + tl.program_id(0)).to(tl.int64)
        at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        row = tl.load(table + token * size + at, at < size)
        tl.store(out + tl.program_id(0).to(tl.int64) * size + at, row, at < size)


class Packed:
    """The NF4 weights of linears one below the other, as one: their bytes are joined, and each linear keeps a view.

    Needs NF4 on a GPU, and in every linear whole blocks of 256 absmax, each of `blocksize` weights: `fits` tells.
    """

    @staticmethod
    def fits(linears: list[FrozenLinear]) -> bool:
        return all(
            isinstance(linear, LinearNF4)
            and linear.packed.is_cuda
            and (not linear.state.nested or linear.state.absmax.numel() % 256 == 0)
            and linear.out_features * linear.in_features % linear.state.blocksize == 0
            for linear in linears
        )

    def __init__(self, linears: list[LinearNF4]):
        def join(parts: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
            whole = torch.cat(parts) if len(parts) > 1 else parts[0]
            return whole, whole.split([len(part) for part in parts])

        states = [linear.state for linear in linears]
        self.blocksize, self.nested, self.code = states[0].blocksize, states[0].nested, states[0].code
        self.packed, views = join([linear.packed for linear in linears])
        self.absmax, absmax_views = join([state.absmax for state in states])
        for linear, view, absmax in zip(linears, views, absmax_views, strict=True):
            linear.packed, linear.state.absmax = view, absmax
        if self.nested:
            self.code_of_absmax = states[0].state2.code
            self.absmax_of_absmax, views = join([state.state2.absmax for state in states])
            for state, view in zip(states, views, strict=True):
                state.state2.absmax = view
            self.offset = torch.cat([s.offset.expand(len(s.state2.absmax)) for s in states])  # one for each of those

    def dequantise(self, out: Tensor) -> Tensor:
        """All weights in out's dtype  # (O, I)"""
        nested = (self.code_of_absmax, self.absmax_of_absmax, self.offset) if self.nested else (self.absmax,) * 3
        blocks = 32  # a program: on an H100 within 10 % of copy speed from 4096 x 4096 on
        grid = (triton.cdiv(triton.cdiv(out.numel(), self.blocksize), blocks),)
        nf4_kernel[grid](
            self.packed, self.absmax, *nested, self.code, out, out.numel(),
            HALF=self.blocksize // 2, NESTED=self.nested, BLOCKS=blocks, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
        return out


class Aside:
    """`with Aside(device) as aside:` runs on a second stream what is not needed at once; `aside.join()` waits for it.

    LoRA's products are small: beside the large one they cost next to nothing. On a CPU all of this does nothing.
    """

    streams: dict = {}  # main stream -> the one beside it

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


class GroupFunction(torch.autograd.Function):
    """y = [x W_1^T + s_1 (x A_1^T) B_1^T, x W_2^T + ...], see quant/linear.py for each line of backward.

    x (N, I); A (R_1 + R_2 + ..., I) of the parts that have LoRA, or None, and their B (O_i, R_i) -> y (N, O)
    """

    @staticmethod
    def forward(ctx, group, x, lora_A, *lora_Bs):
        ctx.group = group
        if lora_A is not None:
            with Aside(x.device) as aside:
                z = x @ lora_A.T  # (N, R)
        y = group.multiply(x)  # (N, O)
        if lora_A is not None:
            aside.join()
            for (rows, ranks, scaling), lora_B in zip(group.slices, lora_Bs, strict=True):
                y[:, rows].addmm_(z[:, ranks], lora_B.T, alpha=scaling)
            ctx.save_for_backward(x, z, lora_A, *lora_Bs)
        return y

    @staticmethod
    def backward(ctx, g):
        group, grad_x, grad_A, grad_Bs = ctx.group, None, None, []
        saved = ctx.saved_tensors  # read once: under recomputation each reading would run the block again
        if saved:
            x, z, lora_A, *lora_Bs = saved
            with Aside(g.device) as aside:
                grad_z = torch.empty_like(z)
                for (rows, ranks, scaling), lora_B in zip(group.slices, lora_Bs, strict=True):
                    torch.addmm(z[:, ranks], g[:, rows], lora_B, beta=0, alpha=scaling, out=grad_z[:, ranks])
                    grad_Bs.append(torch.addmm(lora_B, g[:, rows].T, z[:, ranks], beta=0, alpha=scaling))
                grad_A = grad_z.T @ x  # (R, I)
        if ctx.needs_input_grad[1]:
            grad_x = g @ group.weight(g.dtype)  # (N, I)
        if saved:
            aside.join()
            if grad_x is not None:
                grad_x.addmm_(grad_z, lora_A)
        return None, grad_x, grad_A, *grad_Bs


class Group:
    """Linears of one input as one product. A callable, no module: the linears stay where they are and own the weights.

    `parts` are quant.linear.FrozenLinear, bare or inside a lora.layer.LoRALinear without dropout.
    """

    def __init__(self, parts: list[nn.Module], scratch: dict):
        self.parts, self.scratch = parts, scratch
        self.bases = [getattr(part, "base", part) for part in parts]
        self.lora = [part for part in parts if hasattr(part, "lora_A")]
        self.shape = (sum(base.out_features for base in self.bases), self.bases[0].in_features)
        self.device = next(self.bases[0].buffers()).device
        scratch["size"] = max(scratch.get("size", 0), self.shape[0] * self.shape[1])
        self.slices = []  # for each part with LoRA: its columns of y, its columns of z, its scaling
        row = rank = 0
        for part, base in zip(parts, self.bases, strict=True):
            if part in self.lora:
                self.slices.append((slice(row, row + base.out_features), slice(rank, rank + part.rank), part.scaling))
                rank += part.rank
            row += base.out_features
        self.kept: Tensor | None = None
        self.packed = Packed(self.bases) if triton is not None and Packed.fits(self.bases) else None
        self.int8 = JoinedInt8(self.bases) if all(isinstance(base, LinearInt8) for base in self.bases) else None
        if all(isinstance(base, Linear16) for base in self.bases):
            # 16 bits already: one matrix from the start, of which the linears become views.
            self.kept = torch.cat([base.weight for base in self.bases]) if len(parts) > 1 else self.bases[0].weight
            for base, rows in zip(self.bases, self.kept.split([b.out_features for b in self.bases]), strict=True):
                base.weight = rows
        self.factors: tuple | None = None  # (A, B_1, B_2, ...) in the compute dtype, set anew for each training step

    def multiply(self, x: Tensor) -> Tensor:
        """The frozen part, x W^T + b.  (N, I) -> (N, O)"""
        if self.int8:
            return self.int8.multiply(x)
        return torch.nn.functional.linear(x, self.weight(x.dtype), self.bias(x.dtype))

    def weight(self, dtype: torch.dtype) -> Tensor:
        """All weights of the group, one below the other  # (O, I); overwritten by the next group"""
        if self.kept is not None and self.kept.dtype == dtype:
            return self.kept
        room = self.scratch.get(dtype)
        if room is None:
            room = self.scratch[dtype] = torch.empty(self.scratch["size"], dtype=dtype, device=self.device)
        return self.fill(room[: self.shape[0] * self.shape[1]].view(self.shape))

    def fill(self, weight: Tensor) -> Tensor:
        if self.packed:
            return self.packed.dequantise(weight)
        if self.int8:
            return self.int8.dequantise_into(weight)
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

    def __call__(self, x: Tensor) -> Tensor:
        """(N, I) -> (N, O)"""
        factors = self.factors
        if factors is None and self.lora:
            factors = (torch.cat([p.lora_A for p in self.lora]).to(x.dtype), *(p.lora_B.to(x.dtype) for p in self.lora))
        return GroupFunction.apply(self, x, *(factors or (None,)))


def kernels_missing() -> str | None:
    """What Triton's kernels lack on this machine, if anything"""
    if triton is None:
        return "Triton"
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") or shutil.which("cc")
    return None if compiler else "C compiler (gcc or clang), which Triton needs"


class HostEmbedding(nn.Module):
    """The embedding (V, C) in pinned host memory; the GPU reads the rows that it needs (without Triton they are copied,
    which no CUDA graph can record).  (N,) -> (N, C)"""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.by_kernel = kernels_missing() is None
        self.weight = nn.Parameter(weight.pin_memory(), requires_grad=False)

    def _apply(self, fn, recurse=True):
        return self  # stays where it is

    def forward(self, tokens: Tensor) -> Tensor:
        if not (self.by_kernel and tokens.is_cuda):
            return self.weight[tokens.cpu()].to(tokens.device)
        tokens = tokens.contiguous()
        out = torch.empty(len(tokens), self.weight.shape[1], dtype=self.weight.dtype, device=tokens.device)
        size = out.shape[1]
        rows_kernel[(len(tokens), triton.cdiv(size, 1024))](tokens, self.weight, out, size, BLOCK=1024)
        return out


def group_linears(model: nn.Module) -> list[Group]:
    """Let every block of a llama.model.Llama multiply by groups; returns them in the order of the forward pass."""
    scratch, groups = {}, []
    for block in model.layers:
        attention, mlp = block.self_attn, block.mlp
        attention.qkv = Group([attention.q_proj, attention.k_proj, attention.v_proj], scratch)
        attention.o_proj.forward = Group([attention.o_proj], scratch)
        mlp.gate_up = Group([mlp.gate_proj, mlp.up_proj], scratch)
        mlp.down_proj.forward = Group([mlp.down_proj], scratch)
        groups += [attention.qkv, attention.o_proj.forward, mlp.gate_up, mlp.down_proj.forward]
    return groups
