"""The one door of this package: the plan for a memory budget, the fast layers in place of the readable ones, the
recorded step. train.py and pipeline/ call these and nothing else of fast/; without this folder the readable path runs.
"""

import os
import shutil

import torch

from fast.graph import RecordedStep  # noqa: F401 (for train.py)
from fast.layers import PLAIN, FastLayers
from fast.offload import HostEmbedding, Recompute
from fast.plan import Estimate, Plan, budget_bytes, choose, free_memory
from llama.config import LlamaConfig
from llama.model import Llama
from lora.optim import FlatParameter
from quant.linear import FrozenLinear

try:
    import triton
except ImportError:  # as on a CPU
    triton = None
if triton is not None:
    from fast.norm_glu import FUSED


def kernels_missing() -> str | None:
    """What Triton's kernels lack on this machine, if anything"""
    if triton is None:
        return "Triton"
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") or shutil.which("cc")
    return None if compiler else "C compiler (gcc or clang), which Triton needs"


def plan_training(
    config: LlamaConfig, tokens: int, answers: int, device: torch.device, budget: str | None = None,
    optimiser: str = "adamw", numerics: dict | None = None, explain: bool = False, **options,
) -> tuple[Plan, list[str]]:  # fmt: skip
    """The fastest plan for a budget such as "6GiB", or for what is free on the device, and the reasons, a line each.

    `tokens` in a batch, `answers` supervised at most; `options` are fast.plan.Estimate's. `explain` prints its terms.
    """
    estimate = Estimate(config, tokens, answers, **options)
    if explain:
        whole = Plan(**numerics or {"optimiser": optimiser})
        print(f"with nothing saved and nothing kept, at the peak:\n{estimate.explain(whole)}")
    plan, reasons = choose(estimate, budget_bytes(budget, device), optimiser, device.type == "cuda", numerics)
    if explain:
        print(f"as planned, at the peak:\n{estimate.explain(plan)}")
    return plan, reasons


def plan_pricing(model: Llama, bits: int) -> Plan:
    """Weights dequantised once for all, where the matrices fit twice over"""
    size = sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, FrozenLinear))
    room = 2 * size * model.compute_dtype.itemsize < free_memory(model.device)
    return Plan(keep=len(model.layers)) if bits == 4 and room else Plan()


def host_embedding(model: Llama) -> None:
    """Leave the embedding in the host's memory, where `load_weights` has put it (Plan.host_embed)"""
    model.embed_tokens = HostEmbedding(model.embed_tokens.weight, kernels_missing() is None)


def install(
    model: Llama, plan: Plan = Plan(), flat: FlatParameter | None = None, tokens: int | None = None
) -> str:
    """Put FastLayers in place of the textbook layers, with what the plan keeps and recomputes. Returns what runs now.

    `flat` holds the factors that are trained; `tokens` is the size of a training batch, for a plan that recomputes.
    """
    device = model.device
    missing = kernels_missing() if device.type == "cuda" else "GPU"
    recompute = None
    if plan.recompute:
        recompute = Recompute(plan.recompute, plan.offload, (tokens, model.config.hidden_size), device)
    layers = model.run_layers = FastLayers(model, PLAIN if missing else FUSED, not missing, flat, recompute)
    layers.keep(plan.keep, model.compute_dtype)
    what = "Triton kernels" if not missing else "plain PyTorch" if missing == "GPU" else f"plain PyTorch (no {missing})"
    return f"fast/layers.py: merged linears, {what}"


def can_record(model: Llama) -> bool:
    """Whether a CUDA graph can hold a step: on a GPU, with all kernels"""
    return model.device.type == "cuda" and model.run_layers.kernels
