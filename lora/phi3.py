"""LoRA on Phi-3, whose attention and MLP are fused in PEFT's files: three of our layers are one module there.

transformers' Phi-3 has one module `qkv_proj` where we have q_proj, k_proj and v_proj (and `gate_up_proj` for gate_proj
and up_proj), and PEFT wants one A and one B for it. Our factors are exact there as blocks of a larger rank, each part's
B beside zeros in the other parts' rows:

    A = [A_q; A_k; A_v]  (3R, I)        B = [B_q 0 0; 0 B_k 0; 0 0 B_v]  (O_q + O_k + O_v, 3R)

with alpha scaled along (`rank_pattern`, `alpha_pattern`), so that `scaling` stays what it was. The file's metadata,
which PEFT does not read, holds the `split`: which parts the blocks are, and how many rows each part has. An adapter
trained by PEFT on `qkv_proj` has one A for all parts: it is read as three equal ones, each with its rows of B.
"""

import json
import math
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from lora.layer import PREFIX

# Fused name -> its parts, in the order of their rows. llama/weights.py has the same table: lora/ imports no network.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def is_fused(model: nn.Module) -> bool:
    """Whether transformers' model has FUSED's modules in place of our layers."""
    return getattr(getattr(model, "config", None), "fused_projections", False)


def part_rows(model: nn.Module, parent: str, kind: str) -> list[int]:
    """Rows O of each part of a fused module, whether or not the part has LoRA."""
    parts = [model.get_submodule(f"{parent.removeprefix(PREFIX)}.{part}") for part in FUSED[kind]]
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
        rows, rank = part_rows(model, parent, kind), len(lora_A)
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
    """Back to our names. A kind that `split` does not know has one A for all its parts, as PEFT trains it.

    Raises ValueError that names the key where a fused factor does not have the model's shape.
    """
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
        rows = part_rows(model, parent, kind)
        parts, lora_B = split.get(kind, {}).get("parts"), tensors[partner]
        blocks = len(parts) if parts else 1
        if len(lora_B) != sum(rows) or {len(lora_A), lora_B.shape[1]} != {rank * blocks}:
            shapes = f"{tuple(lora_A.shape)} and {tuple(lora_B.shape)}"
            raise ValueError(f"{key} and its lora_B are {shapes}; the model's {kind} has {sum(rows)} rows")
        for part, of_part in zip(FUSED[kind], lora_B.split(rows), strict=True):
            if parts and part not in parts:
                continue
            block = slice(parts.index(part) * rank, (parts.index(part) + 1) * rank) if parts else slice(None)
            ours[f"{parent}.{part}.lora_A.weight"] = lora_A[block]
            ours[f"{parent}.{part}.lora_B.weight"] = of_part[:, block]
    return ours


def fused_names(tensors: dict[str, Tensor]) -> set[str]:
    """Last names of the modules that a file's factors belong to."""
    return {key.partition(".lora_")[0].rpartition(".")[2] for key in tensors}


def unfused_targets(targets: list[str], split: dict[str, dict]) -> list[str]:
    """Names of transformers' modules -> of our layers: `qkv_proj` becomes its parts with LoRA, others stay."""
    parts = {kind: split.get(kind, {}).get("parts", FUSED[kind]) for kind in FUSED}
    return [name for target in targets for name in parts.get(target, (target,))]


def read_split(weights: Path) -> dict[str, dict]:
    """How the fused modules of a file are made of blocks; empty where PEFT wrote it, or none is fused."""
    with safe_open(weights, framework="pt") as file:
        return json.loads((file.metadata() or {}).get("split", "{}"))


def patterns(split: dict[str, dict], rank: int, alpha: float, rslora: bool) -> dict[str, dict]:
    """PEFT's keys for modules of n blocks: rank n R, and the alpha that leaves alpha / rank (or its root) as it was."""
    n = {kind: len(blocks["parts"]) for kind, blocks in split.items()}
    return {
        "rank_pattern": {kind: n[kind] * rank for kind in n},
        "alpha_pattern": {kind: alpha * (math.sqrt(n[kind]) if rslora else n[kind]) for kind in n},
    }


def without_patterns(config: dict, split: dict[str, dict], path: Path, weights: Path) -> dict:
    """adapter_config.json without the two keys that `patterns` adds. Raises ValueError where they do not fit."""
    needed = patterns(split, config.get("r"), config.get("lora_alpha"), config.get("use_rslora", False))
    for key, values in needed.items():
        if config.get(key) != values:
            raise ValueError(f"{path}: {key} does not fit the blocks of {weights.name}")
    return {key: value for key, value in config.items() if key not in needed}
