"""Put LoRA into a model: freeze everything, wrap the chosen linears, assert that nothing else can learn.

    names = inject(model, rank=16, alpha=32)       # layers.0.self_attn.q_proj, ...
"""

from torch import nn

from lora.layer import LoRALinear
from quant.linear import FrozenLinear

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL_LINEAR = ATTENTION + ("gate_proj", "up_proj", "down_proj")  # every linear of a block, never lm_head, as in QLoRA


def target_names(targets: str) -> tuple[str, ...]:
    """`all-linear`, `attention`, or last names joined by commas, such as `q_proj,v_proj`."""
    named = {"all-linear": ALL_LINEAR, "attention": ATTENTION}
    return named.get(targets) or tuple(name.strip() for name in targets.split(",") if name.strip())


def inject(
    model: nn.Module,
    *,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    rslora: bool = False,
    targets: str = "all-linear",
) -> list[str]:
    """Wrap every frozen linear whose last name is in `targets`; return their full names, in order. Once a model.

    Raises ValueError where a target names no layer (a typing error would train a smaller adapter in silence),
    where rank, alpha or dropout make no sense, and where anything but LoRA factors is left trainable.
    """
    if rank < 1 or alpha <= 0 or not 0 <= dropout < 1:
        raise ValueError(f"LoRA needs rank >= 1, alpha > 0 and 0 <= dropout < 1, got {rank=}, {alpha=}, {dropout=}")
    wanted = target_names(targets)
    if lora_layers(model):
        raise ValueError("the model has LoRA layers already")
    model.requires_grad_(False)
    # Collected first: the walk must not step into the layers that it is adding.
    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, FrozenLinear)]
    chosen = [(name, module) for name, module in linears if name.rpartition(".")[2] in wanted]
    unmatched = [t for t in wanted if not any(name.rpartition(".")[2] == t for name, _ in chosen)]
    if unmatched or not chosen:
        known = sorted({name.rpartition(".")[2] for name, _ in linears})
        raise ValueError(
            f"LoRA targets {', '.join(unmatched or [targets])} name no layer; the model has {', '.join(known)}"
        )
    for name, module in chosen:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, LoRALinear(module, rank, alpha, dropout, rslora))
    # Frozen weights are buffers and cannot appear here; embedding, head and norms are parameters, none of which may ask
    # for a gradient.
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    expected = {f"{name}.{factor}" for name, _ in chosen for factor in ("lora_A", "lora_B")}
    if trainable != expected:
        raise ValueError(f"trainable tensors differ from the LoRA factors: {sorted(trainable ^ expected)[:5]}")
    return [name for name, _ in chosen]


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Full name -> layer, for every LoRA layer of a model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}
