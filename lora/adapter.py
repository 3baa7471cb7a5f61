"""The adapter on disk, in PEFT's format: adapter_model.safetensors + adapter_config.json.

PEFT names a factor after the module in transformers' model:
`base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`. Our names are the same without the leading
`base_model.model.` and `model.` (transformers wraps the decoder as `.model`). A key that matches nothing is an error:
a silently ignored adapter answers like the base model.
"""

import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from lora.inject import inject, lora_layers

PREFIX = "base_model.model.model."


def save_adapter(model: nn.Module, directory: Path, base_model: str) -> None:
    """Write both files into `directory` (which the caller makes whole by a rename)."""
    layers = lora_layers(model)
    first = next(iter(layers.values()))
    tensors = {}
    for name, layer in layers.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = layer.lora_A.detach().cpu().contiguous()  # (R, I)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = layer.lora_B.detach().cpu().contiguous()  # (O, R)
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": first.rank,
        "lora_alpha": first.alpha,
        "lora_dropout": first.dropout.p,
        "use_rslora": first.rslora,
        "target_modules": sorted({name.rpartition(".")[2] for name in layers}),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
    }
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def load_adapter(model: nn.Module, directory: Path) -> None:
    """Inject the LoRA layers that the config names into a fresh model and fill them.

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
        tensors = load_file(weights)
    except (json.JSONDecodeError, SafetensorError) as error:
        raise ValueError(f"the adapter in {directory} is damaged or cut short: {error}") from None
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type {config.get('peft_type')!r} is not supported, only LORA")
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
    inject(
        model,
        rank=config["r"],
        alpha=config["lora_alpha"],
        dropout=config.get("lora_dropout", 0.0),
        rslora=config.get("use_rslora", False),
        targets=targets if isinstance(targets, str) else ",".join(targets),
    )
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
