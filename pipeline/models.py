"""From a directory to a quantised model: device and dtype, the base, its linears quantised as they are read, what lies
where in memory.

`llama/` and `quant/` do not know each other: here the weights that one reads are handed to the other.
"""

import argparse
import os
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from llama.config import LlamaConfig
from llama.families import config_from_directory
from llama.model import Llama
from llama.tokenizer import Tokenizer
from llama.weights import load_weights
from pipeline.hub import resolve_model
from pricing.data.batch import Shape
from pricing.distribution.quantile_head import price_head_parameters
from quant.int8 import quantise_weight
from quant.linear import FrozenLinear
from quant.quantise import quantise_linear

try:
    from fast import install as fast
except ImportError as error:
    if error.name != "fast":  # it is there, but broken
        raise
    fast = None  # the folder has been deleted: the readable path trains and prices

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
READABLE = "readable: llama/model.py and quant/linear.py, line by line"
GIB = 1 << 30


def pick_device(name: str) -> torch.device:
    """`auto`: a GPU if there is one. Raises ValueError where a GPU is asked for and there is none."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("--device cuda: this PyTorch sees no GPU; use --device cpu, or install a CUDA build of torch")
    return torch.device(name)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto`: bfloat16 where the hardware multiplies it, float32 elsewhere, or what $QLORA_DTYPE says. float16 is not
    offered: its range overflows in training."""
    if name == "auto":
        name = os.environ.get("QLORA_DTYPE", "auto")
    if name in DTYPES:
        return DTYPES[name]
    if name != "auto":
        raise ValueError(f"QLORA_DTYPE is {name!r}; it takes {', '.join(DTYPES)} or auto")
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float32
    able = getattr(torch.cpu, "get_capabilities", dict)()
    return torch.bfloat16 if any(able.get(k) for k in ("avx512_bf16", "amx_bf16", "bf16")) else torch.float32


def open_base(model_name: str) -> tuple[LlamaConfig, Tokenizer, Path]:
    """What is known before any weight is read. Raises ValueError where tokenizer and model do not fit."""
    directory = resolve_model(model_name)
    tokenizer, config = Tokenizer.from_directory(directory), config_from_directory(directory)
    if tokenizer.vocab_size > config.vocab_size:
        sizes = f"the tokenizer has {tokenizer.vocab_size} ids, the embedding {config.vocab_size}"
        raise ValueError(f"{directory}: {sizes}")
    return config, tokenizer, directory


def plan_memory(args, config: LlamaConfig, shape: Shape, device, dtype, numerics: dict | None) -> tuple:
    """The fast path's plan for --memory-budget, or None for the readable path; and its reasons, a line each."""
    if not fast and (args.memory_budget or args.explain_memory):
        raise ValueError("--memory-budget and --explain-memory plan the fast path, and the folder fast/ is not there")
    if not fast or args.readable or args.dropout:
        return None, []
    plan, reasons = fast.plan_training(
        config, shape.tokens, shape.answers, device, args.memory_budget, args.optimiser, numerics,
        bits=args.bits, dtype=dtype, rank=args.rank, targets=args.targets, blocksize=args.blocksize,
        double_quant=args.double_quant,
        head_numbers=price_head_parameters(config.hidden_size) if args.head == "quantile" else 0,
        explain=args.explain_memory,
    )  # fmt: skip
    if args.explain_memory:
        sys.exit()
    return plan, reasons


def load_base(
    config: LlamaConfig, directory: Path, device: torch.device, dtype: torch.dtype, options: argparse.Namespace,
    head8: bool = False, host_embed: bool = False,
) -> Llama:  # fmt: skip
    """Each linear quantised as it is read (`options`: bits, blocksize, double_quant, outlier_threshold), embedding and
    head left in the compute dtype; with `head8` an lm_head of its own in 8 bits, with `host_embed` the embedding in
    the host's memory."""
    with torch.device("meta"):
        model = Llama(config, dtype)

    def make_linear(weight, bias):
        return quantise_linear(
            weight, bias, bits=options.bits, dtype=dtype, blocksize=options.blocksize,
            double_quant=options.double_quant, outlier_threshold=options.outlier_threshold,
        )  # fmt: skip

    how = {4: "quantising to NF4", 8: "quantising to int8", 16: "loading in 16 bits"}[options.bits]
    on_host = ["embed_tokens.weight"] * host_embed + ["lm_head.weight"] * head8
    load_weights(
        model, directory, device, make_linear, on_host, lambda names: tqdm(names, desc=how, unit="linear", leave=False)
    )
    if host_embed:
        fast.host_embedding(model)
    if head8:
        weight, model.head_scale = quantise_weight(model.lm_head.weight, device)
        model.lm_head.weight = torch.nn.Parameter(weight, requires_grad=False)
    return model


def memory_report(model: Llama, price_head: torch.nn.Module | None = None) -> str:
    """Logical weights apart from stored bytes, by storage, trainable and frozen. A packed NF4 byte is two weights."""
    rows: dict[str, list[int]] = {}

    def add(kind: str, numbers: int, size: int) -> None:
        row = rows.setdefault(kind, [0, 0])
        row[0] += numbers
        row[1] += size

    for module in model.modules():
        if isinstance(module, FrozenLinear):
            bias = 0 if module.bias is None else module.bias.numel()
            stored = "NF4" if hasattr(module, "packed") else str(module.weight.dtype).removeprefix("torch.")
            add(f"frozen linears, {stored}", module.out_features * module.in_features + bias, module.stored_bytes())
    for parameter in model.parameters():
        kind = "trainable (LoRA)" if parameter.requires_grad else "frozen embedding, head, norms"
        add(f"{kind}, {str(parameter.dtype).removeprefix('torch.')}", parameter.numel(), parameter.nbytes)
    for parameter in price_head.parameters() if price_head else ():
        add("trainable (price head), float32", parameter.numel(), parameter.nbytes)
    rows["total"] = [sum(r[0] for r in rows.values()), sum(r[1] for r in rows.values())]
    lines = [f"  {kind:<42}{n:>16,} parameters {size / 2**20:>10,.1f} MiB" for kind, (n, size) in rows.items()]
    return "\n".join(lines)


def peak_memory(device: torch.device) -> float:
    """GiB: the GPU's peak allocation, or on a CPU the process's peak resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / GIB
