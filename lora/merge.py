"""Merge an adapter into its base: a plain Hugging Face style directory that needs neither LoRA nor 4 or 8 bits.

    python -m lora.merge --ckpt out/ --base BASE_DIRECTORY --out merged/

    W' = W + scaling * B A        in float32, then bfloat16

What is W? A run with `--bits 4` or `8` learnt beside the *dequantised* weight, quantisation error included. Merged into
the original 16-bit weight the sum is another model; so each target is first quantised and dequantised as in training
(on a CPU here: a run trained on CUDA may differ in the few values that quant/nf4.py names).
With `--bits 8` the run rounded its activations too (quant/int8.py), which the merged model does not.
Phi-3's fused matrices are quantised part by part, as in training.
Other tensors are rounded to bfloat16. The base is read and written shard by shard;
it must be the run's own, by the digest in run.json. Tokenizer files and the chat template come along.
"""

import json
import shutil
from pathlib import Path
from typing import Iterator

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from common.cli import make_parser, run_main
from common.files import write_directory
from common.manifest import read_whole
from common.shards import INDEX, SINGLE, check_weights, read_header, weight_map
from lora.adapter import CONFIG, WEIGHTS
from lora.layer import PREFIX
from lora.phi3 import read_split
from quant.quantise import quantise_linear

FLOATS = ("F32", "F16", "BF16")
TEXTS = ("merges.txt", "vocab.txt")  # of older tokenizers


def merged_weight(
    weight, lora_A, lora_B, scaling: float, rows: list[int] | None, bits: int, blocksize: int, double_quant: bool
) -> torch.Tensor:
    """W' = W + scaling * B A: weight (O, I) in any float dtype, A (R, I), B (O, R) -> (O, I) bfloat16.

    `rows` are those of each part that is quantised apart. Raises ValueError where the shapes do not fit.
    """
    frozen = [
        quantise_linear(part, bits=bits, dtype=weight.dtype, blocksize=blocksize, double_quant=double_quant)
        for part in weight.split(rows or len(weight))
    ]
    whole = torch.cat([part.dequantise(torch.float32) for part in frozen])
    if whole.shape != (lora_B.shape[0], lora_A.shape[1]):
        shapes = f"{tuple(whole.shape)}, the adapter is for one of {(lora_B.shape[0], lora_A.shape[1])}"
        raise ValueError(f"a weight of the base is {shapes}: another base model?")
    return (whole + scaling * (lora_B.float() @ lora_A.float())).to(torch.bfloat16)


def read_adapter(ckpt: Path) -> tuple[dict[str, torch.Tensor], dict, float, dict]:
    """The factors by PEFT's names, how Phi-3's are made of blocks, the scaling, and how the base was quantised.

    Raises ValueError where `ckpt` is no whole checkpoint.
    """
    try:
        options = json.loads((ckpt / "run.json").read_text())["options"]
        quant = {key: options[key] for key in ("bits", "blocksize", "double_quant")}
        config = json.loads((ckpt / CONFIG).read_text())
        scaling = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
        # Blocks of a fused module have n times the rank and as much more alpha: the same scaling.
        quant["digest"] = (json.loads((ckpt / "run.json").read_text()).get("base_model") or {}).get("sha256")
        return load_file(ckpt / WEIGHTS), read_split(ckpt / WEIGHTS), scaling, quant
    except (OSError, KeyError, json.JSONDecodeError, SafetensorError) as error:
        raise ValueError(f"{ckpt} is no whole checkpoint of train.py: {error}") from None


def read_tensors(shard: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and tensor, one at a time. Raises ValueError that names the file."""
    try:
        with safe_open(shard, framework="pt") as tensors:
            for key in tensors.keys():
                yield key, tensors.get_tensor(key)
    except SafetensorError as error:
        raise ValueError(f"{shard} is truncated or damaged: {error}") from None


def merge(ckpt: Path, base: Path, out: Path) -> int:
    """Write `out`; returns the number of merged matrices. Raises ValueError where adapter and base do not fit."""
    adapter, split, scaling, quant = read_whole(ckpt, lambda: read_adapter(ckpt))
    if out.exists():
        raise ValueError(f"{out} exists; choose another name")
    files = weight_map(base)  # as training reads them: what else lies in the folder is no part of the model
    check_base_weights(base, files)
    check_weights(base, quant.pop("digest"), ckpt)
    merged, total = 0, 0
    with write_directory(out) as part:
        for file in base.iterdir():
            if file.is_file() and file.name != INDEX and (
                file.suffix in (".json", ".model", ".jinja") or file.name in TEXTS
            ):  # fmt: skip
                shutil.copy(file, part)
        for shard in sorted(set(files.values())):
            written = {}
            for key, weight in read_tensors(base / shard):
                if files.get(key) != shard:
                    continue
                name = PREFIX + key.removeprefix("model.").removesuffix(".weight")
                lora_A, lora_B = (adapter.pop(f"{name}.{factor}.weight", None) for factor in ("lora_A", "lora_B"))
                if lora_A is None:
                    written[key] = weight.to(torch.bfloat16)
                    continue
                rows = split.get(name.rpartition(".")[2], {}).get("rows")
                written[key] = merged_weight(weight, lora_A, lora_B, scaling, rows, **quant)
                merged += 1
            save_file(written, part / shard, metadata={"format": "pt"})
            total += sum(tensor.nbytes for tensor in written.values())
        if set(files.values()) != {SINGLE}:
            index = {"metadata": {"total_size": total}, "weight_map": files}
            (part / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        write_config(part / "config.json")
        if adapter:
            raise ValueError(f"{base} lacks the weight that {next(iter(adapter))} belongs to: another base model?")
    return merged


def check_base_weights(base: Path, files: dict[str, str]) -> None:
    """Raises ValueError that names a tensor which is missing or already quantised: its scale lies elsewhere."""
    for shard in sorted(set(files.values())):
        header, _ = read_header(base / shard)
        for key in (key for key, where in files.items() if where == shard):
            if key not in header:
                raise ValueError(f"{base / shard} lacks {key}, though the index lists it")
            if (dtype := header[key]["dtype"]) not in FLOATS:
                raise ValueError(f"{base / shard}: {key} has dtype {dtype}, expected one of {', '.join(FLOATS)}")


def write_config(path: Path) -> None:
    """One dtype, under the key that the file has (transformers 5 calls it `dtype`), else the older one."""
    described = json.loads(path.read_text(encoding="utf-8"))
    key = "dtype" if "dtype" in described else "torch_dtype"
    described = {k: v for k, v in described.items() if k not in ("dtype", "torch_dtype")} | {key: "bfloat16"}
    path.write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = make_parser(__doc__, prog="python -m lora.merge")
    parser.add_argument("--ckpt", type=Path, default=Path("out"), help="the directory that train.py wrote")
    where = "directory of the base model (train.py prints it in brackets, on the line `model`)"
    parser.add_argument("--base", type=Path, required=True, help=where)
    parser.add_argument("--out", type=Path, required=True, help="directory to write; must not exist")
    args = parser.parse_args()
    print(f"merged {merge(args.ckpt, args.base, args.out)} matrices into {args.out}")
    if (args.ckpt / "members").is_dir() or (args.ckpt / "head.safetensors").is_file():
        print("a price head and further members are no part of it: it answers in digits, as the first adapter does")


if __name__ == "__main__":
    run_main(main)
