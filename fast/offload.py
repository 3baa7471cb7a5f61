"""What a memory budget moves out of the GPU or leaves to be computed again: the embedding's table, blocks' activations.

    python train.py --memory-budget 6GiB            # fast/plan.py says which of these a run uses
"""

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None


if triton is not None:

    @triton.jit
    def rows_kernel(tokens, table, out, size, BLOCK: tl.constexpr):
        token = tl.load(tokens + tl.program_id(0)).to(tl.int64)
        at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        row = tl.load(table + token * size + at, at < size)
        tl.store(out + tl.program_id(0).to(tl.int64) * size + at, row, at < size)


class HostEmbedding(nn.Module):
    """The embedding (V, C) in pinned host memory; the GPU reads the rows that it needs (without Triton they are copied,
    which no CUDA graph can record).  (N,) -> (N, C)"""

    def __init__(self, weight: Tensor, kernels: bool):
        super().__init__()
        self.kernels = kernels
        self.weight = nn.Parameter(weight.pin_memory(), requires_grad=False)

    def _apply(self, fn, recurse=True):
        return self  # stays where it is

    def forward(self, tokens: Tensor) -> Tensor:
        if not (self.kernels and tokens.is_cuda):
            return self.weight[tokens.cpu()].to(tokens.device)
        tokens = tokens.contiguous()
        out = torch.empty(len(tokens), self.weight.shape[1], dtype=self.weight.dtype, device=tokens.device)
        size = out.shape[1]
        rows_kernel[(len(tokens), triton.cdiv(size, 1024))](tokens, self.weight, out, size, BLOCK=1024)
        return out


class Recompute:
    """Runs a block; the first `blocks` keep their input alone and are run again in backward.

    With `offload` the inputs wait in pinned memory: each is copied out while the next block computes, and copied back
    one block ahead of its use. `shape` (N, C) is that of the inputs in training.
    """

    def __init__(self, blocks: int, offload: bool, shape: tuple[int, int], device: torch.device):
        self.blocks, self.shape, self.host = blocks, shape, []
        if offload:
            self.stream = torch.cuda.Stream(device)
            self.host = [torch.empty(shape, pin_memory=True) for _ in range(blocks)]
            self.left = [torch.cuda.Event() for _ in range(blocks)]
            self.flying: dict[int, torch.Tensor] = {}  # inputs whose copy may still be under way
            self.arriving: dict[int, tuple] = {}

    def __call__(self, number: int, block, x: Tensor, delta: Tensor | None, *rest) -> tuple[Tensor, Tensor]:
        """The `number`-th block, a function of (x, delta, *rest) -> (x, delta)"""
        if number >= self.blocks:
            return block(x, delta, *rest)
        x = x if delta is None else x + delta

        def run():
            return torch.utils.checkpoint.checkpoint(
                block, x, None, *rest, use_reentrant=False, preserve_rng_state=False
            )

        if not self.host or x.shape != self.shape:
            return run()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: self.send(number, t), self.fetch):
            return run()

    def send(self, number: int, x: torch.Tensor):
        if x.shape != self.shape or x.dtype != torch.float32:
            return x
        main = torch.cuda.current_stream()
        self.stream.wait_stream(main)
        with torch.cuda.stream(self.stream):
            self.host[number].copy_(x, non_blocking=True)
            self.left[number].record()
        if number:  # its memory may be used again once the copy before has left
            main.wait_event(self.left[number - 1])
        self.flying = {number: x}
        return number

    def bring(self, number: int) -> None:
        if number >= 0 and number not in self.arriving:
            x = torch.empty(self.shape, device=self.stream.device)
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                x.copy_(self.host[number], non_blocking=True)
                arrived = torch.cuda.Event()
                arrived.record()
            self.arriving[number] = x, arrived

    def fetch(self, packed):
        if torch.is_tensor(packed):
            return packed
        self.flying.clear()
        self.bring(packed)
        x, arrived = self.arriving.pop(packed)
        self.bring(packed - 1)
        torch.cuda.current_stream().wait_event(arrived)
        return x
