"""Where the rooms meet: what train.py, evaluate.py and predict.py share. `llama/`, `quant/`, `lora/` and `pricing/`
do not know each other; here a directory becomes a quantised model, and a model becomes prices.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Callable

import numpy as np
import torch
from tqdm import tqdm

from llama.config import LlamaConfig
from llama.hub import resolve_model
from llama.model import Llama
from llama.tokenizer import Tokenizer
from llama.weights import load_weights
from lora.adapter import load_adapter
from pricing.batch import by_length
from pricing.decode import PriceTree, price_distribution
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
            message = "out of GPU memory; try a smaller --batch, with --accumulate to make up for it: " + message[:160]
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


def load_base(model_name: str, device, dtype, bits: int, blocksize: int = 64, double_quant: bool = True) -> tuple:
    """(Llama, Tokenizer, directory): each linear quantised as it is read, embedding and head left in the compute
    dtype."""
    directory = resolve_model(model_name)
    tokenizer = Tokenizer.from_directory(directory)
    with torch.device("meta"):
        model = Llama(LlamaConfig.from_directory(directory), dtype)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"{directory}: the tokenizer has {tokenizer.vocab_size} ids, the embedding {model.config.vocab_size}"
        )

    def make_linear(weight, bias):
        return quantise_linear(weight, bias, bits=bits, dtype=dtype, blocksize=blocksize, double_quant=double_quant)

    how = "quantising to NF4" if bits == 4 else "loading in 16 bits"
    load_weights(model, directory, device, make_linear, lambda names: tqdm(names, desc=how, unit="linear", leave=False))
    return model, tokenizer, directory


def published_name(model_name: str) -> str:
    """What other programs know a model by: smollm2's id on the hub, else what the user typed."""
    return "HuggingFaceTB/SmolLM2-135M-Instruct" if model_name == "smollm2" else model_name


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
    model, tokenizer, _ = load_base(
        options["model"], device, dtype, options["bits"], options["blocksize"], options["double_quant"]
    )
    load_adapter(model, Path(ckpt))
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


def distributions(
    model: Llama, tree: PriceTree, prompts: list[list[int]], batch: int, prune: float, on_batch=None
) -> np.ndarray:
    """P(price) of every prompt, in order (items, 1000); batched by length. `on_batch(indices, P)` sees each batch as
    it comes."""
    result = np.zeros((len(prompts), 1000))
    device = model.embed_tokens.weight.device

    def prefill(part, choices):
        return model.prefill(part, choices.to(device))

    def extend(cache, tokens, parents, choices):
        return model.extend(cache, tokens, parents, choices.to(device))

    for indices in by_length(prompts, batch):
        result[indices], _ = price_distribution(prefill, extend, [prompts[i] for i in indices], tree, prune)
        if on_batch:
            on_batch(indices, result[indices])
    return result
