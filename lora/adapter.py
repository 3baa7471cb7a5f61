"""The adapter on disk, in PEFT's format: adapter_model.safetensors + adapter_config.json.

PEFT names a factor after the module in transformers' model:
`base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`. Our names are the same without the leading
`base_model.model.` and `model.` (transformers wraps the decoder as `.model`). A key that matches nothing is an error:
a silently ignored adapter answers like the base model.

Phi-3 has one module `qkv_proj` in transformers where we have three, and PEFT wants one A and one B for it. Ours are
exact there as blocks of a larger rank, each part's B beside zeros in the other parts' rows:

    A = [A_q; A_k; A_v]  (3R, I)        B = [B_q 0 0; 0 B_k 0; 0 0 B_v]  (O_q + O_k + O_v, 3R)

with alpha scaled along (`rank_pattern`, `alpha_pattern`), so that `scaling` stays what it was. Which parts the blocks
are stands in the file's metadata, which PEFT does not read. An adapter trained by PEFT on `qkv_proj` has one A for all
parts: it is read as three equal ones, each with its rows of B.
"""

import json
import math
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora.inject import inject, lora_layers, target_names

PREFIX = "base_model.model.model."
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def is_fused(model: nn.Module) -> bool:
    """Whether transformers' model has FUSED's modules in place of our layers"""
    return getattr(getattr(model, "config", None), "fused_projections", False)


def part_rows(model: nn.Module, parent: str, kind: str) -> list[int]:
    """Rows O of each part of a fused module, whether or not it has LoRA"""
    parts = [model.get_submodule(f"{parent}.{part}") for part in FUSED[kind]]
    return [getattr(part, "base", part).out_features for part in parts]


def fuse(model: nn.Module, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, dict]]:
    """Factors under our names -> under the fused ones, as blocks; and for each kind its parts with LoRA and all rows.

    {name.lora_A.weight: (R, I), ...} -> {name.lora_A.weight: (n R, I), ...}, {kind: {"parts": [...], "rows": [...]}}
    """
    fused, split = {}, {}
    for key, lora_A in tensors.items():
        name, _, factor = key.partition(".lora_")
        parent, _, last = name.rpartition(".")
        kind = next((kind for kind, parts in FUSED.items() if last in parts), None)
        if kind is None:
            fused[key] = lora_A
        if kind is None or f"{parent}.{kind}.lora_A.weight" in fused or factor != "A.weight":
            continue
        parts = [part for part in FUSED[kind] if f"{parent}.{part}.lora_A.weight" in tensors]
        rows, rank = part_rows(model, parent.removeprefix(PREFIX), kind), len(lora_A)
        whole = lora_A.new_zeros(sum(rows), len(parts) * rank)
        for i, part in enumerate(parts):
            start = sum(rows[: FUSED[kind].index(part)])
            lora_B = tensors[f"{parent}.{part}.lora_B.weight"]  # (O, R)
            whole[start : start + len(lora_B), i * rank : (i + 1) * rank] = lora_B
        fused[f"{parent}.{kind}.lora_A.weight"] = torch.cat([tensors[f"{parent}.{p}.lora_A.weight"] for p in parts])
        fused[f"{parent}.{kind}.lora_B.weight"] = whole
        split[kind] = {"parts": parts, "rows": rows}
    return fused, split


def unfuse(model: nn.Module, tensors: dict[str, Tensor], split: dict[str, dict], rank: int) -> dict[str, Tensor]:
    """Back to our names. A kind that `split` does not know has one A for all its parts, as PEFT trains it."""
    ours = {}
    for key, lora_A in tensors.items():
        name, _, factor = key.partition(".lora_")
        parent, _, kind = name.rpartition(".")
        partner = f"{name}.lora_B.weight"
        if kind not in FUSED or factor not in ("A.weight", "B.weight"):
            ours[key] = lora_A
            continue
        if factor == "B.weight" or partner not in tensors:
            continue  # read with its A; where that is missing, load_adapter misses our names
        rows = part_rows(model, parent.removeprefix(PREFIX), kind)
        parts, lora_B = split.get(kind, {}).get("parts"), tensors[partner]
        if len(lora_B) != sum(rows) or {len(lora_A), lora_B.shape[1]} != {rank * len(parts or "1")}:
            shapes = f"{tuple(lora_A.shape)} and {tuple(lora_B.shape)}"
            raise ValueError(f"{key} and its lora_B are {shapes}; the model's {kind} has {sum(rows)} rows")
        for part, of_part in zip(FUSED[kind], lora_B.split(rows), strict=True):
            if parts and part not in parts:
                continue
            block = slice(parts.index(part) * rank, (parts.index(part) + 1) * rank) if parts else slice(None)
            ours[f"{parent}.{part}.lora_A.weight"] = lora_A[block]
            ours[f"{parent}.{part}.lora_B.weight"] = of_part[:, block]
    return ours


def read_split(weights: Path) -> dict[str, dict]:
    """How the fused modules of a file are made of blocks; empty where PEFT wrote it, or none is fused"""
    with safe_open(weights, framework="pt") as file:
        return json.loads((file.metadata() or {}).get("split", "{}"))


def patterns(split: dict[str, dict], rank: int, alpha: float, rslora: bool) -> dict[str, dict]:
    """PEFT's keys for modules of n blocks: rank n R, and the alpha that leaves alpha / rank (or its root) as it was"""
    n = {kind: len(blocks["parts"]) for kind, blocks in split.items()}
    return {
        "rank_pattern": {kind: n[kind] * rank for kind in n},
        "alpha_pattern": {kind: alpha * (math.sqrt(n[kind]) if rslora else n[kind]) for kind in n},
    }


def save_adapter(model: nn.Module, directory: Path, base_model: str) -> None:
    """Write both files into `directory` (which the caller makes whole by a rename)."""
    layers = lora_layers(model)
    first = next(iter(layers.values()))
    tensors = {}
    for name, layer in layers.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = layer.lora_A.detach().cpu().contiguous()  # (R, I)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = layer.lora_B.detach().cpu().contiguous()  # (O, R)
    names, metadata, pattern = {name.rpartition(".")[2] for name in layers}, {"format": "pt"}, {}
    if is_fused(model):
        tensors, split = fuse(model, tensors)
        names = {key.partition(".lora_")[0].rpartition(".")[2] for key in tensors}
        metadata["split"] = json.dumps(split)
        pattern = patterns(split, first.rank, first.alpha, first.rslora)
    save_file(tensors, directory / "adapter_model.safetensors", metadata=metadata)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": first.rank,
        "lora_alpha": first.alpha,
        "lora_dropout": first.dropout.p,
        "use_rslora": first.rslora,
        "target_modules": sorted(names),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
        **pattern,
    }
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def load_adapter(model: nn.Module, directory: Path) -> None:
    """Inject the LoRA layers that the config names into a fresh model and fill them, or fill those of an adapter of the
    same kind that is there.

    Raises ValueError that names the file and the key for anything missing, left over, mis-shaped, or of a PEFT
    variant that this code does not compute (DoRA, biases, saved modules, per-layer ranks).
    """
    path = Path(directory) / "adapter_config.json"
    weights = Path(directory) / "adapter_model.safetensors"
    for needed in (path, weights):
        if not needed.is_file():
            raise ValueError(f"{needed} does not exist: {directory} is no adapter directory")
    try:
        config = json.loads(path.read_text())
        tensors, split = load_file(weights), read_split(weights)
    except (json.JSONDecodeError, SafetensorError) as error:
        raise ValueError(f"the adapter in {directory} is damaged or cut short: {error}") from None
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type {config.get('peft_type')!r} is not supported, only LORA")
    if split:
        if not is_fused(model):
            raise ValueError(f"{weights} was written for a model with {', '.join(split)}: another base model?")
        needed = patterns(split, config.get("r"), config.get("lora_alpha"), config.get("use_rslora", False))
        for key, values in needed.items():
            if config.pop(key, None) != values:
                raise ValueError(f"{path}: {key} does not fit the blocks of {weights.name}")
    for key in (
        "use_dora",
        "modules_to_save",
        "rank_pattern",
        "alpha_pattern",
        "fan_in_fan_out",
        "layers_to_transform",
    ):
        if config.get(key):
            raise ValueError(f"{path}: {key}={config[key]!r} is not supported")
    if config.get("bias", "none") != "none":
        raise ValueError(f"{path}: bias={config['bias']!r} is not supported")
    if missing := [key for key in ("r", "lora_alpha", "target_modules") if not config.get(key)]:
        raise ValueError(f"{path} lacks {missing[0]}")
    targets = config["target_modules"]
    targets = list(target_names(targets)) if isinstance(targets, str) else targets
    # PEFT writes whole paths for small models. Were it not all layers, a factor would be missing below.
    targets = sorted({target.rpartition(".")[2] for target in targets})
    if is_fused(model):
        parts = {kind: split.get(kind, {}).get("parts", FUSED[kind]) for kind in FUSED}
        targets = [name for target in targets for name in parts.get(target, (target,))]
        tensors = unfuse(model, tensors, split, config["r"])
    alpha, rslora = config["lora_alpha"], config.get("use_rslora", False)
    if there := list(lora_layers(model).values()):  # another adapter's: its numbers are replaced
        if {(layer.alpha, layer.rslora) for layer in there} != {(alpha, rslora)}:
            raise ValueError(f"{path}: its alpha is not that of the adapter in the model, which it is to replace")
    else:
        dropout = config.get("lora_dropout", 0.0)
        inject(model, rank=config["r"], alpha=alpha, dropout=dropout, rslora=rslora, targets=",".join(targets))
    for name, layer in lora_layers(model).items():
        for factor in ("lora_A", "lora_B"):
            key = f"{PREFIX}{name}.{factor}.weight"
            tensor = tensors.pop(key, None)
            if tensor is None:
                raise ValueError(f"{weights} lacks {key}")
            parameter = getattr(layer, factor)
            if tensor.shape != parameter.shape:
                raise ValueError(f"{weights}: {key} is {tuple(tensor.shape)}, the model needs {tuple(parameter.shape)}")
            parameter.data.copy_(tensor)
    if tensors:
        raise ValueError(f"{weights}: {next(iter(tensors))} matches no layer of the model ({len(tensors)} such keys)")
