"""LoRA: instead of changing a frozen W (O, I), learn a small product beside it.

    y = x W^T + scaling * (dropout(x) A^T) B^T          A (R, I), B (O, R), R << I

    scaling = alpha / rank            (Hu et al. 2021, arXiv 2106.09685)
    scaling = alpha / sqrt(rank)      rsLoRA (Kalajdzievski 2023, arXiv 2312.03732): steady as rank grows

A starts random and B at zero, so the product starts at zero and training begins exactly at the (quantised) base
model. Rank 16 on a 576 x 576 layer trains 18,432 numbers instead of 331,776. The arithmetic, backward included, is
one function with the frozen part, in quant/linear.py: this file only holds the factors.
"""

import math

import torch
from torch import Tensor, nn

PREFIX = "base_model.model.model."  # PEFT's name of a layer is this and our name of it


class LoRALinear(nn.Module):
    """A frozen linear plus a trainable low-rank product. (N, I) -> (N, O)

    `base` is a quant.linear.FrozenLinear: it adds the product itself, in `forward(x, x_lora, lora_A, lora_B, scaling)`.
    """

    def __init__(self, base: nn.Module, rank: int, alpha: float, dropout: float = 0.0, rslora: bool = False):
        super().__init__()
        self.base = base
        self.rank, self.alpha, self.rslora = rank, alpha, rslora
        self.scaling = alpha / (math.sqrt(rank) if rslora else rank)
        self.dropout = nn.Dropout(dropout)
        device = next(base.buffers()).device
        # float32: an Adam step is about the learning rate. Once the schedule has lowered that below half a bfloat16
        # step (3e-5 for a weight of 0.01), every update of a bfloat16 factor would round to nothing.
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, device=device, dtype=torch.float32))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=device, dtype=torch.float32))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # U(-1/sqrt(I), 1/sqrt(I)), as in PEFT and loralib

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x, self.dropout(x), self.lora_A, self.lora_B, self.scaling)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha}, scaling={self.scaling:.4g}"
