"""The trained numbers as one flat vector, and the optimisers that move it.

    python -m pytest tests/lora/test_optim.py       # against one optimiser step for each tensor, and bitsandbytes' own

An adapter has hundreds of small matrices. Laid end to end in one vector, clipping is one norm, an update is one
kernel and zeroing is one fill; the matrices stay what they were, as views. AdamW works number by number, so the
result is the same to the bit. Order: a parent module after the other (self_attn, mlp, ...), and in each first all A,
then all B, so that the A of q, k and v lie one below the other, ready to be multiplied as one matrix (fast/linears.py).
"""

from itertools import groupby

import torch
from torch import Tensor, nn

from lora.layer import LoRALinear

# name -> (bitsandbytes class or None for PyTorch's own, bytes of state a trained number)
OPTIMISERS = {
    "adamw": (None, 8.0),
    "adamw8bit": ("AdamW8bit", 2.04),
    "paged-adamw8bit": ("PagedAdamW8bit", 2.04),
    "sgd": (None, 4.0),
    "lion8bit": ("Lion8bit", 1.02),
}


class FlatParameter:
    """All lora_A and lora_B of a model, then the `others` that are trained with them (a price head), as views of
    `parameter` (n,) float32, their gradients as views of its own."""

    def __init__(self, layers: dict[str, LoRALinear], others: list[nn.Parameter] = ()):
        self.order: list[tuple[LoRALinear, str]] = []
        for _, siblings in groupby(layers.items(), key=lambda item: item[0].rpartition(".")[0]):
            siblings = [layer for _, layer in siblings]
            self.order += [(layer, factor) for factor in ("lora_A", "lora_B") for layer in siblings]
        factors = [getattr(layer, factor) for layer, factor in self.order]
        factors += others
        self.parameter = nn.Parameter(torch.cat([f.detach().reshape(-1) for f in factors]))
        self.parameter.grad = torch.zeros_like(self.parameter)
        self.sizes = [f.numel() for f in factors]
        for factor, data, grad in zip(
            factors, self.parameter.data.split(self.sizes), self.parameter.grad.split(self.sizes), strict=True
        ):
            factor.data, factor.grad = data.view_as(factor), grad.view_as(factor)


def make_optimiser(name: str, parameter: nn.Parameter, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """`adamw` and `sgd` (momentum 0.9) are PyTorch's, fused, with a rate that may live on the GPU; the others keep
    their state in 8 bits (Dettmers et al. 2021, arXiv 2110.02861), `paged` in memory that the GPU may move to the host.

    Raises ValueError for an unknown name.
    """
    if name not in OPTIMISERS:
        raise ValueError(f"unknown optimiser {name!r}; choose from {', '.join(OPTIMISERS)}")
    if name == "adamw":
        rate = torch.tensor(lr, device=parameter.device)
        return torch.optim.AdamW(
            [parameter], lr=rate, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True, capturable=parameter.is_cuda
        )
    if name == "sgd":
        rate = torch.tensor(lr, device=parameter.device)
        return torch.optim.SGD([parameter], lr=rate, momentum=0.9, weight_decay=weight_decay, fused=True)
    import bitsandbytes.optim as optim

    betas = (0.9, 0.99)
    return getattr(optim, OPTIMISERS[name][0])([parameter], lr=lr, betas=betas, weight_decay=weight_decay)


def capturable(optimiser: torch.optim.Optimizer) -> bool:
    """Whether a CUDA graph may hold its step: bitsandbytes' take rate and step number from Python each time."""
    return isinstance(optimiser, (torch.optim.AdamW, torch.optim.SGD))


def initialise(optimiser: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor | int]:
    """The optimiser's state for the flat vector, made (all zero) if no step has made it yet."""
    state = optimiser.state[parameter]
    if state:
        return state
    if not capturable(optimiser):
        optimiser.init_state(optimiser.param_groups[0], parameter, 0, 0)
    elif isinstance(optimiser, torch.optim.AdamW):
        state["step"] = torch.zeros((), device=parameter.device)
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
    else:
        state["momentum_buffer"] = torch.zeros_like(parameter)
    return state
