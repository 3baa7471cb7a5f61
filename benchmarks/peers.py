"""PEFT and Unsloth on the benchmark's work, as their own examples use them. Run through benchmarks.train_speed.

Both get padded batches made beforehand, the loss of the model itself (`labels`), and PyTorch's fused AdamW in a bare
loop: what a Trainer adds to a step is not counted against them. Each peer can also be had as its users may know it
from a trainer:

    peft              float32 activations, head and loss: what `prepare_model_for_kbit_training` sets up
    peft-autocast     the same under bfloat16 autocast, as in a Trainer with bf16=True
    unsloth           padded batches; each block is compiled, which can take minutes
    unsloth-packed    one row without padding: what Unsloth's SFTTrainer chooses by itself on an H100

The libraries are imported where they are used: one that is missing fails alone, and `unsloth` has to come before the
libraries that it patches.
"""

import os
import tempfile
from argparse import Namespace
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.workload import measure

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IGNORED = -100  # the label of a token without loss


def padded(batch: list[list[int]], supervised: int) -> dict[str, Tensor]:
    """Right padding, attention mask, labels on the last `supervised` tokens: (B, T) each."""
    longest = max(map(len, batch))
    ids = torch.tensor([tokens + [0] * (longest - len(tokens)) for tokens in batch])
    mask = torch.tensor([[1] * len(tokens) + [0] * (longest - len(tokens)) for tokens in batch])
    labels = torch.full_like(ids, IGNORED)
    for row, tokens in enumerate(batch):
        last = slice(len(tokens) - supervised, len(tokens))
        labels[row, last] = ids[row, last]
    return {"input_ids": ids.to(DEVICE), "attention_mask": mask.to(DEVICE), "labels": labels.to(DEVICE)}


def packed(batch: list[list[int]], supervised: int) -> dict[str, Tensor]:
    """One row (1, N) of all sequences, with what Unsloth's padding-free collator gives beside it."""
    ids = torch.tensor([sum(batch, [])])
    labels = torch.tensor([sum(([IGNORED] * (len(t) - supervised) + t[-supervised:] for t in batch), [])])
    positions = torch.tensor([sum((list(range(len(t))) for t in batch), [])])
    lengths = torch.tensor([len(t) for t in batch], dtype=torch.int32)  # stays on the CPU, as the collator leaves it
    moved = {"input_ids": ids, "labels": labels, "position_ids": positions}
    return {name: tensor.to(DEVICE) for name, tensor in moved.items()} | {"packed_seq_lengths": lengths}


def train(args: Namespace, sequences, model, collate, settings: str, autocast: bool = False) -> dict:
    """The loop that the peers share. The contract of the result is in `measure`."""
    kinds = {type(module).__name__ for module in model.modules()}
    if kinds & {"Linear4bit", "Linear8bitLt"} != {4: {"Linear4bit"}, 8: {"Linear8bitLt"}, 16: set()}[args.bits]:
        raise RuntimeError(f"--bits {args.bits} was not obeyed")  # without bitsandbytes, Unsloth goes on in 16 bits
    if missing := set(args.targets) - {name.rpartition(".")[2] for name, _ in model.named_modules()}:
        raise ValueError(f"LoRA on {', '.join(sorted(missing))} cannot be: the model has no such module")  # Phi-3 fuses
    batches = [collate(batch, args.supervised) for batch in sequences]
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)

    def step(number: int) -> Tensor:
        with torch.autocast(DEVICE, torch.bfloat16) if autocast else nullcontext():
            loss = model(**batches[number]).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return loss

    return measure(args, sequences, step, settings)


def peft(args: Namespace, sequences, autocast: bool = False) -> dict:
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        args.model,
        quantization_config={4: nf4, 8: BitsAndBytesConfig(load_in_8bit=True), 16: None}[args.bits],
        dtype=torch.bfloat16,
        device_map={"": DEVICE},
    )
    model.config.use_cache = False  # as Trainer does: a cache of keys and values is of no use in training
    checkpointing = args.checkpointing == "default"
    if args.bits < 16:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=checkpointing)
    elif checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()  # or a frozen embedding would cut the graph
    lora = LoraConfig(r=args.rank, lora_alpha=args.alpha, target_modules=args.targets, task_type="CAUSAL_LM")
    model = get_peft_model(model, lora).train()
    precision = "bf16 autocast" if autocast else "no autocast"
    settings = f"{'checkpointing' if checkpointing else 'no checkpointing'}, padded, {precision}"
    return train(args, sequences, model, padded, settings, autocast)


def unsloth(args: Namespace, sequences, collate=padded) -> dict:
    if DEVICE == "cpu":
        raise RuntimeError("Unsloth's kernels need a GPU")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # or it asks the hub about the model's name, and counts its users
    compiled = Path(tempfile.gettempdir()) / "unsloth_compiled_cache"
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(compiled))  # else a folder here
    from unsloth import FastLanguageModel

    # "unsloth": activations go to the host. Below 512 tokens of max_seq_length plain checkpointing would replace it.
    checkpointing = "unsloth" if args.checkpointing == "default" else False
    model, _ = FastLanguageModel.from_pretrained(
        args.model,
        max_seq_length=2048,
        dtype=torch.bfloat16,
        load_in_4bit=args.bits == 4,
        load_in_8bit=args.bits == 8,
        load_in_16bit=args.bits == 16,
        use_gradient_checkpointing=checkpointing,
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=args.rank,
        lora_alpha=args.alpha,
        lora_dropout=0,
        bias="none",
        target_modules=args.targets,
        use_gradient_checkpointing=checkpointing,
    )
    model = FastLanguageModel.for_training(model)
    how = "offloading checkpointing" if checkpointing else "no checkpointing"
    return train(args, sequences, model, collate, f"{how}, {collate.__name__}")


PEERS = {
    "peft": peft,
    "peft-autocast": lambda args, sequences: peft(args, sequences, autocast=True),
    "unsloth": unsloth,
    "unsloth-packed": lambda args, sequences: unsloth(args, sequences, collate=packed),
}
