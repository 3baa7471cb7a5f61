"""The residual stream at the last token of a prompt: what price heads read.

    states = last_states(model, prompts, batch_tokens)        (items, C): what the model's own head reads there
    states = head_states(model, prompts, settings, None)      after several blocks, with and without the adapter
"""

import hashlib
import json
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from tqdm import tqdm

from common.files import whole_file
from llama.attention import Layout
from llama.model import Llama
from lora.inject import lora_layers
from pricing.data.batch import length_batches

READ = ("states", "blocks", "mean")  # the settings of a head that say what it reads


def forward_tokens(model: Llama, asked: int | None) -> int:
    """`--batch-tokens`, or what is fast where the model is"""
    return asked or (16384 if model.device.type == "cuda" else 2048)


@contextmanager
def without_adapter(model: Llama):
    """The base model, bit for bit, while this lasts: B = 0."""
    layers = lora_layers(model).values()
    kept = [layer.lora_B.detach().clone() for layer in layers]
    try:
        for layer in layers:
            layer.lora_B.data.zero_()
        yield
    finally:
        for layer, lora_B in zip(layers, kept, strict=True):
            layer.lora_B.data.copy_(lora_B)


@torch.no_grad()
def last_states(
    model: Llama, prompts: list[list[int]], batch_tokens: int | None, blocks=None, mean: bool = False, on_batch=None
) -> np.ndarray:
    """The residual stream at the last token of each prompt (items, C) float32, in order; batched by length.

    `blocks`: after these, from 1 to the number of blocks L, which is normed as the head reads it (the default), one
    vector after the other (items, len(blocks) C): what transformers calls hidden_states[block]. With `mean`, each is
    followed by its mean over the prompt's tokens. `on_batch(indices)` after each batch. Raises ValueError for a block
    that is not there.
    """
    last = len(model.layers)
    blocks = [last] if blocks is None else list(blocks)
    if not blocks or any(not 1 <= block <= last for block in blocks):
        raise ValueError(f"the model has the blocks 1 to {last}, asked for {', '.join(map(str, blocks)) or 'none'}")
    width = model.config.hidden_size * (2 if mean else 1)
    result = np.zeros((len(prompts), len(blocks) * width), np.float32)
    taken: dict[int, torch.Tensor] = {}

    def reduce(stream: torch.Tensor) -> torch.Tensor:  # (N, C) -> (B, C) or (B, 2C)
        rows = stream.index_select(0, layout.last)
        # A sum by segment: index_add_ would add in another order each time on a GPU.
        return torch.cat([rows, torch.segment_reduce(stream, "mean", lengths=lengths)], 1) if mean else rows

    def keeper(block: int):
        def keep(module, args, output):
            taken[block] = reduce((output[0] + output[1]).float())

        return keep

    hooks = [model.layers[block - 1].register_forward_hook(keeper(block)) for block in set(blocks) - {last}]
    try:
        for indices in length_batches(prompts, forward_tokens(model, batch_tokens)):
            part = [prompts[i] for i in indices]
            layout = Layout.packed([len(prompt) for prompt in part], model.device)
            lengths = torch.tensor([len(prompt) for prompt in part], device=model.device)
            tokens = torch.tensor([token for prompt in part for token in prompt], device=model.device)  # (N,)
            if mean:
                taken[last] = reduce(model.hidden_states(tokens, layout))
            else:
                taken[last] = model.hidden_states(tokens, layout, at=layout.last)
            result[indices] = torch.cat([taken[block] for block in blocks], dim=1).cpu().numpy()
            if on_batch:
                on_batch(indices)
    finally:
        for hook in hooks:
            hook.remove()
    return result


def adapter_digest(ckpt: str | Path) -> str:
    return hashlib.sha256((Path(ckpt) / "adapter_model.safetensors").read_bytes()).hexdigest()


def head_states(model: Llama, prompts: list[list[int]], settings: dict, batch_tokens: int | None) -> np.ndarray:
    """What a head with `settings` (states, blocks, mean) reads of each prompt (items, I) float32."""
    passes = {"tuned": [nullcontext], "untuned": [without_adapter], "both": [nullcontext, without_adapter]}
    passes, parts = passes[settings["states"]], []
    with tqdm(total=len(passes) * len(prompts), desc="states", unit="item", leave=False) as bar:
        for context in passes:
            with context(model):
                options = settings["blocks"], settings["mean"], lambda indices: bar.update(len(indices))
                parts.append(last_states(model, prompts, batch_tokens, *options))
    return np.concatenate(parts, axis=1)


def kept_states(ckpt: str | Path, run: dict, model: Llama, prompts: list, settings: dict, batch_tokens) -> np.ndarray:
    """head_states, kept in the checkpoint's states/ under a hash of all that decides them: adapter, base, precision,
    which states, token ids."""
    keys = ("bits", "blocksize", "double_quant", "outlier_threshold")
    which = [settings[key] for key in READ]
    precision = [str(model.compute_dtype), model.device.type, [run["options"].get(key) for key in keys]]
    identity = [run.get("base_model"), adapter_digest(ckpt), precision, which, prompts]
    path = Path(ckpt) / "states" / f"{hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]}.safetensors"
    try:
        return load_file(path)["states"]
    except (OSError, SafetensorError, KeyError):  # not there, or damaged: computed again
        pass
    states = head_states(model, prompts, settings, batch_tokens)
    path.parent.mkdir(exist_ok=True)
    with whole_file(path) as part:
        save_file({"states": states}, part)
    return states
