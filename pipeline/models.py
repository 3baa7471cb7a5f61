"""Where the rooms meet: what train.py, evaluate.py and predict.py share. Here a directory becomes a quantised model:
`llama/` and `pricing/` know neither each other nor `quant/` and `lora/`. forecast.py makes prices of it.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from fast.linears import Group, HostEmbedding, group_linears, kernels_missing
from fast.plan import Plan, Recompute, free_memory
from llama.config import LlamaConfig
from llama.families import config_from_directory
from llama.model import Llama
from llama.tokenizer import Tokenizer
from llama.weights import load_weights
from lora.adapter import load_adapter
from pipeline.hub import PACKAGED, resolve_model
from pricing.data.batch import Shape
from pricing.data.items import Item
from pricing.data.sources import load_items
from quant.int8 import quantise_weight
from quant.linear import BITS, FrozenLinear, quantise_linear

# What a run of before an option did, which its run.json does not say.
OLDER = {"head": "none", "members": 1, "neighbours": 0, "train_items": None, "outlier_threshold": 6.0}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
GIB = 1 << 30


def pick_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("--device cuda: this PyTorch sees no GPU; use --device cpu, or install a CUDA build of torch")
    return torch.device(name)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies it, float32 elsewhere. float16 is not offered: its range overflows in
    training."""
    if name != "auto":
        return DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float32
    able = getattr(torch.cpu, "get_capabilities", dict)()
    return torch.bfloat16 if any(able.get(k) for k in ("avx512_bf16", "amx_bf16", "bf16")) else torch.float32


def open_base(model_name: str) -> tuple[LlamaConfig, Tokenizer, Path]:
    """What is known before any weight is read."""
    directory = resolve_model(model_name)
    tokenizer, config = Tokenizer.from_directory(directory), config_from_directory(directory)
    if tokenizer.vocab_size > config.vocab_size:
        sizes = f"the tokenizer has {tokenizer.vocab_size} ids, the embedding {config.vocab_size}"
        raise ValueError(f"{directory}: {sizes}")
    return config, tokenizer, directory


def load_base(config, tokenizer, directory, device, dtype, options, plan: Plan = Plan()) -> Llama:
    """Each linear quantised as it is read (`options`: bits, blocksize, double_quant, outlier_threshold), embedding and
    head left in the compute dtype, or where and how `plan` puts them."""
    with torch.device("meta"):
        model = Llama(config, dtype)

    def make_linear(weight, bias):
        return quantise_linear(
            weight, bias, bits=options.bits, dtype=dtype, blocksize=options.blocksize,
            double_quant=options.double_quant,
            outlier_threshold=options.outlier_threshold,
        )  # fmt: skip

    how = {4: "quantising to NF4", 8: "quantising to int8", 16: "loading in 16 bits"}[options.bits]
    on_host = ["embed_tokens.weight"] * plan.host_embed + ["lm_head.weight"] * plan.head8
    load_weights(
        model, directory, device, make_linear, on_host, lambda names: tqdm(names, desc=how, unit="linear", leave=False)
    )
    if plan.host_embed:
        model.embed_tokens = HostEmbedding(model.embed_tokens.weight)
    if plan.head8:
        weight, model.head_scale = quantise_weight(model.lm_head.weight, device)
        model.lm_head.weight = torch.nn.Parameter(weight, requires_grad=False)
    return model


def speed_up(model: Llama, plan: Plan = Plan(), shape: Shape | None = None) -> list[Group]:
    """The fast path, in place of the readable one: grouped linears, and on a GPU fused elementwise pieces; the plan's
    kept weights and recomputation. `shape` is that of training batches."""
    if plan.recompute:
        size = (shape.tokens, model.config.hidden_size)
        model.run_block = Recompute(model, plan.recompute, plan.offload, size, model.device)
    if model.device.type == "cuda" and (missing := kernels_missing()):
        print(f"no {missing}: the slower readable path runs", file=sys.stderr)
        return []
    groups = group_linears(model)
    per_block = len(groups) // len(model.layers)
    for group in groups[: plan.keep * per_block]:
        group.keep(model.compute_dtype)
    if model.device.type == "cuda":
        model.fuse_pieces()
    return groups


def published_name(model_name: str) -> str:
    """What other programs know a model by: the id on the hub of one that pip fetches, else what the user typed."""
    return PACKAGED[model_name].published if model_name in PACKAGED else model_name


def read_run(ckpt: str | Path) -> dict:
    """run.json of a checkpoint directory. Raises ValueError where it is none."""
    path = Path(ckpt) / "run.json"
    if not path.is_file():
        why = "has no run.json" if Path(ckpt).is_dir() else "does not exist"
        raise ValueError(f"{ckpt} is no checkpoint of train.py: it {why}")
    try:
        run = json.loads(path.read_text())
        missing = {"model", "bits", "blocksize", "double_quant", "data", "size", "max_tokens"} - set(run["options"])
        if missing or not {"prompt", "data", "steps"} <= set(run):
            raise KeyError(", ".join(sorted(missing)))
        options = OLDER | run["options"]
        numbers = ("bits", "blocksize", "size", "max_tokens", "members", "neighbours", "batch_tokens", "rank")
        if wrong := [key for key in numbers if type(options.get(key, 1)) is not int]:
            raise TypeError(f"{wrong[0]} is {options[wrong[0]]!r}")
        if options["bits"] not in BITS or run["prompt"].count("{text}") != 1:
            raise TypeError(f"bits are {options['bits']!r}, the prompt is {run['prompt']!r}")
        return run | {"options": options}
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged or of another version: {error!r}") from None


def check_same_data(run: dict, identity: dict) -> None:
    """Raises ValueError where the data are no longer those of the run: what it held out would be unknown."""
    if any(identity.get(key) != run["data"].get(key) for key in ("sha256", "items", "commit")):
        raise ValueError(
            f"{identity['data']} has changed since the run was trained on it: its splits cannot be trusted"
        )


def run_items(run: dict) -> list[Item]:
    """All items of a run's data. Raises ValueError where they have changed."""
    options = run["options"]
    items, _, identity = load_items(options["data"], options["size"], options["data_seed"], options["strict"])
    check_same_data(run, identity)
    return items


def load_run(ckpt: str | Path, run: dict, device, dtype) -> tuple:
    """(Llama with its adapter, Tokenizer) as a run left them."""
    options = run["options"]
    config, tokenizer, directory = open_base(options["model"])
    settled = Plan(**run.get("plan", {}))  # what was trained beside an lm_head in 8 bits is priced beside it
    model = load_base(config, tokenizer, directory, device, dtype, argparse.Namespace(**options), settled)
    load_adapter(model, Path(ckpt))
    keep = Plan()
    if options["bits"] == 4:  # dequantised once for all, where the matrices fit twice over
        size = sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, FrozenLinear))
        if 2 * size * dtype.itemsize < free_memory(device):
            keep = Plan(keep=len(model.layers))
    speed_up(model, keep)
    return model.eval(), tokenizer


def memory_report(model: Llama, head: torch.nn.Module | None = None) -> str:
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
    for parameter in head.parameters() if head else ():
        add("trainable (price head), float32", parameter.numel(), parameter.nbytes)
    rows["total"] = [sum(r[0] for r in rows.values()), sum(r[1] for r in rows.values())]
    lines = [f"  {kind:<42}{n:>16,} parameters {size / 2**20:>10,.1f} MiB" for kind, (n, size) in rows.items()]
    return "\n".join(lines)


def peak_memory(device: torch.device) -> float:
    """GiB: the GPU's peak allocation, or on a CPU the process's peak resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / GIB
