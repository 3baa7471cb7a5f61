"""Where the rooms meet: what train.py, evaluate.py and predict.py share. `llama/`, `quant/`, `lora/` and `pricing/`
do not know each other; here a directory becomes a quantised model, and a model becomes prices.
"""

import argparse
import hashlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Callable

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from llama.attention import Layout
from llama.config import LlamaConfig
from llama.hub import PACKAGED, resolve_model
from llama.model import Llama
from llama.tokenizer import Tokenizer
from llama.weights import load_weights
from lora.adapter import load_adapter
from lora.inject import lora_layers
from memory import Plan, Recompute, free_memory
from pricing.batch import Shape, by_length
from pricing.decode import PriceTree, price_distribution
from pricing.head import Head, Recipe, fit_head, load_head, save_head
from pricing.items import sample
from pricing.prompt import encode_prompt
from pricing.sources import load_items
from quant.fast import Group, HostEmbedding, group_linears, quantise_head, triton
from quant.linear import FrozenLinear, quantise_linear

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
GIB = 1 << 30


def run_main(main: Callable[[], None]) -> None:
    """Run a script: what a user can mend ends in one line and exit code 2, without a traceback (DEBUG=1 shows it)."""
    try:
        main()
    except KeyboardInterrupt:
        print("\nstopped; nothing half-written is left behind", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        if os.environ.get("DEBUG"):
            raise
        message = " ".join(str(error).split())
        if isinstance(error, torch.OutOfMemoryError):
            message = "out of GPU memory; lower --batch-tokens (with --accumulate to make up for it) or give a "
            message += "--memory-budget: " + " ".join(str(error).split())[:160]
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)


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


def add_model_arguments(parser) -> None:
    """The options that say where and in which precision a model runs."""
    group = parser.add_argument_group("hardware")
    group.add_argument(
        "--device", default="auto", choices=["auto", "cpu", "cuda"], help="default: a GPU if there is one"
    )
    group.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", *DTYPES],
        help="compute dtype of the linears (default: what is fast)",
    )


def add_batch_argument(parser) -> None:
    parser.add_argument(
        "--batch-tokens", type=int, default=None, help="tokens in a forward pass (16,384 on a GPU, 2,048 on a CPU)"
    )


def open_base(model_name: str) -> tuple[LlamaConfig, Tokenizer, Path]:
    """What is known before any weight is read."""
    directory = resolve_model(model_name)
    tokenizer, config = Tokenizer.from_directory(directory), LlamaConfig.from_directory(directory)
    if tokenizer.vocab_size > config.vocab_size:
        sizes = f"the tokenizer has {tokenizer.vocab_size} ids, the embedding {config.vocab_size}"
        raise ValueError(f"{directory}: {sizes}")
    return config, tokenizer, directory


def load_base(config, tokenizer, directory, device, dtype, options, plan: Plan = Plan()) -> Llama:
    """Each linear quantised as it is read (`options`: bits, blocksize, double_quant), embedding and head left in the
    compute dtype, or where and how `plan` puts them."""
    with torch.device("meta"):
        model = Llama(config, dtype)

    def make_linear(weight, bias):
        return quantise_linear(
            weight, bias, bits=options.bits, dtype=dtype, blocksize=options.blocksize, double_quant=options.double_quant
        )

    how = "quantising to NF4" if options.bits == 4 else "loading in 16 bits"
    on_host = ["embed_tokens.weight"] * plan.host_embed + ["lm_head.weight"] * plan.head8
    load_weights(
        model, directory, device, make_linear, on_host, lambda names: tqdm(names, desc=how, unit="linear", leave=False)
    )
    if plan.host_embed:
        model.embed_tokens = HostEmbedding(model.embed_tokens.weight)
    if plan.head8:
        weight, model.head_scale = quantise_head(model.lm_head.weight, device)
        model.lm_head.weight = torch.nn.Parameter(weight, requires_grad=False)
    return model


def speed_up(model: Llama, plan: Plan = Plan(), shape: Shape | None = None) -> list[Group]:
    """The fast path, in place of the readable one: grouped linears, and on a GPU fused elementwise pieces; the plan's
    kept weights and recomputation. `shape` is that of training batches."""
    if plan.recompute:
        size = (shape.tokens, model.config.hidden_size)
        model.run_block = Recompute(model, plan.recompute, plan.offload, size, model.device)
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") or shutil.which("cc")
    if model.device.type == "cuda" and triton is not None and not compiler:
        print("no C compiler (gcc or clang), which Triton needs: the slower readable path runs", file=sys.stderr)
        return []
    groups = group_linears(model)
    per_block = len(groups) // len(model.layers)
    for group in groups[: plan.keep * per_block]:
        group.keep(model.compute_dtype)
    if model.device.type == "cuda" and triton is not None:
        model.fuse_pieces()
    return groups


def published_name(model_name: str) -> str:
    """What other programs know a model by: the id on the hub of one that pip fetches, else what the user typed."""
    return PACKAGED[model_name].published if model_name in PACKAGED else model_name


def read_run(ckpt: str | Path) -> dict:
    """run.json of a checkpoint directory. Raises ValueError where it is none."""
    path = Path(ckpt) / "run.json"
    if not path.is_file():
        raise ValueError(f"{ckpt} is no checkpoint of train.py: it has no run.json")
    try:
        run = json.loads(path.read_text())
        missing = {"model", "bits", "blocksize", "double_quant", "data", "size", "max_tokens"} - set(run["options"])
        if missing or not {"prompt", "data", "steps"} <= set(run):
            raise KeyError(", ".join(sorted(missing)))
        return run
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged or of another version: {error!r}") from None


def check_same_data(run: dict, identity: dict) -> None:
    """Raises ValueError where the data are no longer those of the run: what it held out would be unknown."""
    if any(identity.get(key) != run["data"].get(key) for key in ("sha256", "items", "commit")):
        raise ValueError(
            f"{identity['data']} has changed since the run was trained on it: its splits cannot be trusted"
        )


def load_run(ckpt: str | Path, run: dict, device, dtype) -> tuple:
    """(Llama with its adapter, Tokenizer) as a run left them."""
    options = run["options"]
    config, tokenizer, directory = open_base(options["model"])
    model = load_base(config, tokenizer, directory, device, dtype, argparse.Namespace(**options))
    load_adapter(model, Path(ckpt))
    keep = Plan()
    if options["bits"] == 4:  # dequantised once for all, where the matrices fit twice over
        size = sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, FrozenLinear))
        if 2 * size * dtype.itemsize < free_memory(device):
            keep = Plan(keep=len(model.layers))
    speed_up(model, keep)
    return model.eval(), tokenizer


def memory_report(model: Llama) -> str:
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
    rows["total"] = [sum(r[0] for r in rows.values()), sum(r[1] for r in rows.values())]
    lines = [f"  {kind:<42}{n:>16,} parameters {size / 2**20:>10,.1f} MiB" for kind, (n, size) in rows.items()]
    return "\n".join(lines)


def peak_memory(device: torch.device) -> float:
    """GiB: the GPU's peak allocation, or on a CPU the process's peak resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / GIB


def test_prompts(run: dict, tokenizer: Tokenizer, items: int | None = None) -> list[list[int]]:
    """The prompts of a run's own test items, or of a fixed sample of so many"""
    options = run["options"]
    loaded, _, identity = load_items(options["data"], options["size"], options["data_seed"], options["strict"])
    check_same_data(run, identity)
    test = [item for item in loaded if item.split == "test"]
    return [encode_prompt(i.text, tokenizer, options["max_tokens"], run["prompt"]) for i in sample(test, items)]


def tree_functions(model: Llama, prompts: list[list[int]]) -> tuple[Callable, Callable]:
    """`prefill` and `extend` for pricing.decode, for any of `prompts`: what all begin with is read once, here."""
    shared = 0
    if len(prompts) > 4:  # fewer are sooner read whole
        first, last = min(prompts), max(prompts)  # what these two share, all that lie between share too
        while shared < min(map(len, prompts)) - 1 and first[shared] == last[shared]:
            shared += 1
    prefix = model.read_prefix(prompts[0][:shared]) if shared else None

    def prefill(part, choices):
        return model.prefill([prompt[shared:] for prompt in part], choices.to(model.device), prefix)

    def extend(cache, tokens, parents, choices):
        return model.extend(cache, tokens, parents, choices.to(model.device))

    return prefill, extend


def distributions(
    model: Llama, tree: PriceTree, prompts: list[list[int]], batch_tokens: int | None, prune: float, on_batch=None
) -> np.ndarray:
    """P(price) of every prompt, in order (items, 1000); batched by length. `on_batch(indices, P)` sees each batch as
    it comes."""
    result = np.zeros((len(prompts), 1000))
    prefill, extend = tree_functions(model, prompts)
    for indices in by_length(prompts, batch_tokens or (16384 if model.device.type == "cuda" else 2048)):
        result[indices], _ = price_distribution(prefill, extend, [prompts[i] for i in indices], tree, prune)
        if on_batch:
            on_batch(indices, result[indices])
    return result


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
        for indices in by_length(prompts, batch_tokens or (16384 if model.device.type == "cuda" else 2048)):
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
    keys = ("bits", "blocksize", "double_quant")
    which = [settings[key] for key in ("states", "blocks", "mean")]
    precision = [str(model.compute_dtype), model.device.type, [run["options"][key] for key in keys]]
    identity = [run.get("base_model"), adapter_digest(ckpt), precision, which, prompts]
    path = Path(ckpt) / "states" / f"{hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]}.safetensors"
    try:
        return load_file(path)["states"].numpy()
    except (OSError, SafetensorError, KeyError):  # not there, or damaged: computed again
        pass
    states = head_states(model, prompts, settings, batch_tokens)
    path.parent.mkdir(exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".states-", delete=False) as part:
        save_file({"states": torch.from_numpy(states)}, part.name)
    os.replace(part.name, path)
    return states


def open_head(ckpt: str | Path) -> Head:
    """The head of a checkpoint. Raises ValueError where there is none, or where it was trained beside other weights."""
    head = load_head(ckpt)
    if head.settings.get("adapter") != adapter_digest(ckpt):
        raise ValueError(
            f"the head in {ckpt} was trained on the states of another adapter; "
            f"train it anew with `python -m pricing.head --ckpt {ckpt}`"
        )
    return head


def parse_blocks(text: str | None, layers: int) -> list[int]:
    """[10, 20, 30] from "10,20,30"; by default a third, two thirds and all of the model's `layers`."""
    if text is None:
        return sorted({max(1, round(layers / 3)), max(1, round(2 * layers / 3)), layers})
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise ValueError(f"--blocks takes numbers joined by commas, as in 10,20,30; got {text!r}") from None


def train_head(args: argparse.Namespace, recipe: Recipe) -> None:
    """What `python -m pricing.head` does: states of the run's training and validation items, a head on them."""
    run = read_run(args.ckpt)
    options, device = run["options"], pick_device(args.device)
    items, _, identity = load_items(options["data"], options["size"], options["data_seed"], options["strict"])
    check_same_data(run, identity)
    by_split = {split: [item for item in items if item.split == split] for split in ("train", "val")}
    if args.items is not None:
        by_split["train"] = sample(by_split["train"], args.items)
    if not all(by_split.values()):
        raise ValueError(f"{options['data']}: a head needs training and validation items")
    model, tokenizer = load_run(args.ckpt, run, device, pick_dtype(args.dtype, device))
    blocks = parse_blocks(args.blocks, len(model.layers))
    settings = {"states": args.states, "blocks": blocks, "mean": args.mean, "adapter": adapter_digest(args.ckpt)}
    started, parts = time.perf_counter(), []
    for chosen in by_split.values():
        prompts = [encode_prompt(item.text, tokenizer, options["max_tokens"], run["prompt"]) for item in chosen]
        parts.append(kept_states(args.ckpt, run, model, prompts, settings, args.batch_tokens))
    states = np.concatenate(parts)
    print(
        f"states     {args.states}, after block {', '.join(map(str, blocks))}{' and their means' * args.mean}: "
        f"{states.shape[1]:,} numbers for each of {len(states):,} items in {time.perf_counter() - started:.1f} s"
    )
    started = time.perf_counter()
    joined = by_split["train"] + by_split["val"]
    head = fit_head(joined, states, recipe, device, settings, lambda line: print(f"head       {line}"))
    print(
        f"head       validation off by ${head.settings['val_mae_dollars']:.2f} on {len(by_split['val']):,} items, "
        f"trained in {time.perf_counter() - started:.1f} s; saved as {save_head(head, args.ckpt)}"
    )
    print(f"now run    python evaluate.py --ckpt {args.ckpt} --decode head")
