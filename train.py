"""Fine-tune a Llama in 4, 8 or 16 bits to tell a product's price from its text: QLoRA in one plain loop.

    python train.py --bits 4                                                 SmolLM2-135M on the built-in catalogue
    python train.py --bits 4 --data pc-parts                                                   real products
    python train.py --bits 4 --model meta-llama/Llama-3.1-8B --data items.jsonl --lr 1e-4      your own, on a GPU
    python train.py --bits 4 --readable                                      the very lines of quant/linear.py, slower

Read it downward: one training step, the model, the loop, one run. Its options are in pipeline/options.py.
"""

from pipeline.options import peak_rate, training_options

if __name__ == "__main__":  # before PyTorch is imported, which takes seconds: --help and typing errors answer at once
    ARGUMENTS = training_options(__doc__)

import argparse
import math
import time
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Callable, Iterator

import torch
from torch import Tensor

from common.cli import run_main
from common.stop import Stop
from llama.attention import Layout
from llama.model import Llama
from lora.inject import inject, lora_layers
from lora.optim import FlatParameter, capturable, make_optimiser
from pipeline import checkpoint
from pipeline.checkpoint import TrainingRun, load_metrics, load_trained, open_run
from pipeline.claim import claimed, members
from pipeline.data import load_training_data
from pipeline.models import READABLE, fast, load_base, open_base, peak_memory, pick_device, pick_dtype, plan_memory
from pipeline.prediction import start_price_head, validate
from pipeline.predictor import MOST_CALIBRATION
from pipeline.progress import Progress, one_behind, print_setup
from pipeline.state import load_state
from pipeline.steps import make_step
from pricing.data.batch import batches, count_batches, pack, shape_of
from pricing.data.items import sample
from pricing.distribution.decode import PriceTree
from pricing.distribution.loss import AnswerLoss
from pricing.distribution.quantile_head import JointLoss

# ---- one training step ----------------------------------------------------------------------------------------------


def training_step(model: Llama, loss: Callable, inputs: dict[str, Tensor | int], weight: Tensor) -> Tensor:
    """Forward, loss and backward of one packed batch; gradients are added to those that are there.

    `inputs`: tokens, positions (N,) and where each sequence begins (pricing/data/batch.py); `at` (M,), the positions
    that predict a token of an answer; what the loss needs. `weight` is 1 / supervised tokens of the whole window: a sum
    in nats times one weight, since a mean of means would weigh short batches more. Returns the loss, (): nats a
    supervised token, the weighted price head's included where there is one.
    """
    layout = Layout(inputs["positions"], inputs["rows"], inputs["longest"], inputs["slots"], edges=inputs["edges"])
    states = model.hidden_states(inputs["tokens"], layout, at=inputs["at"])  # (N,) -> (M, C)
    # The logits (M, V), of no other tokens, have no name here: it would hold them in memory until backward is done.
    nats = loss(model.head(states), inputs, states) * weight  # ()
    nats.backward()
    return nats.detach()


def optimiser_step(model, loss, flat: FlatParameter, optimiser, clip: float, window: list[dict], scalars) -> Tensor:
    """All that a step does on the device: each batch of the window, clipping by the gradient's norm, the update.

    Run as it is, or recorded and replayed (fast/graph.py). `scalars`: rate, weight, and idle, 1 to leave the weights
    alone. Returns (2,): the window's loss, as `training_step` has it, and the gradient's norm before it is clipped.
    """
    gradient = flat.parameter.grad
    gradient.zero_()
    total = sum(training_step(model, loss, inputs, scalars["weight"]) for inputs in window)
    norm = gradient.norm()
    gradient.mul_(clip / norm.clamp(min=clip))
    outcome = torch.stack([total, norm])
    if capturable(optimiser):
        # PyTorch's fused optimisers do nothing, and count no step, where found_inf is 1.
        optimiser.found_inf = torch.maximum(1 - outcome.isfinite().all().float(), scalars["idle"])
        optimiser.param_groups[0]["lr"] = scalars["rate"]
        optimiser.step()
    return outcome


# ---- the model -------------------------------------------------------------------------------------------------------


def prepare_model(args, config, directory, device, dtype, examples, numerics: dict, host_embed: bool) -> tuple:
    """Quantise each linear as it is read, freeze, inject LoRA, add the price head; with --resume and --start-from those
    of the run that goes on. Returns (model, price head or None)."""
    model = load_base(config, directory, device, dtype, args, numerics["head8"], host_embed)
    if earlier := args.out if args.resume else args.start_from:
        price_head = load_trained(model, earlier, args.head)
    else:
        inject(model, rank=args.rank, alpha=args.alpha, dropout=args.dropout, rslora=args.rslora, targets=args.targets)
    model.train()
    if args.head == "none":
        return model, None
    price_head = price_head if earlier else start_price_head(model, examples, args.batch_tokens)
    return model, price_head.to(device).requires_grad_(True)


# ---- the loop --------------------------------------------------------------------------------------------------------


def learning_rate(progress: float, peak: float, schedule: str, warmup: float) -> float:
    """The rate at `progress` (0 to 1 of the run): linear warm-up, then cosine, linear or constant."""
    if progress < warmup:
        return peak * progress / warmup
    rest = min((progress - warmup) / max(1 - warmup, 1e-9), 1.0)
    return peak * {"cosine": 0.5 * (1 + math.cos(math.pi * rest)), "linear": 1 - rest, "constant": 1.0}[schedule]


def start_steps(args, take_step: Callable, stream: Iterator, shape, progress, stop: Stop, last) -> Iterator[tuple]:
    """Start the steps up to `last`, or until a signal comes, or the batches or the minutes run out: (number, rate,
    tokens, its outcome)"""
    for number in range(progress.step + 1, last + 1):
        share = (number - 0.5) / progress.total  # of the run; the middle of the step, so that no rate is 0
        if args.max_minutes:
            share = max(share, progress.elapsed() / (60 * args.max_minutes))
        over = share >= 1 or stop.signal
        window = [] if over else [pack(chosen, shape) for chosen in islice(stream, args.accumulate)]
        if not window:
            return
        rate = learning_rate(share, args.lr, args.schedule, args.warmup)
        yield number, rate, sum(batch.real_tokens for batch in window), take_step(window, rate)


def loop(run: TrainingRun, progress: Progress, take_step, stream, shape, stop, check, store) -> int | None:
    """Steps in segments, each up to the next check or save; `check` says whether it was the best so far.

    Returns the step that was saved last, if one was.
    """
    args, total, saved = run.args, progress.total, progress.step if run.args.resume else None
    val_every = args.val_every or max(1, total // 2)
    while progress.step < total:
        ends = [total] + [progress.step + n - progress.step % n for n in (val_every, args.save_every) if n]
        end = min(ends)
        # A recorded step is queued before the one ahead of it is read, so that the GPU never waits.
        for number, rate, tokens, read in one_behind(start_steps(args, take_step, stream, shape, progress, stop, end)):
            progress.report(number, rate, tokens, *read())
        if progress.step < end or end == total:  # a signal came, the minutes are over, or all is done
            break
        saving = bool(args.save_every) and end % args.save_every == 0
        if run.data.val and end % val_every == 0:
            saving |= check() and args.keep == "best"
            if args.patience and progress.since_best() >= args.patience:
                print(f"\nstopped    no better validation error in {args.patience} checks")
                break
        if saving:
            store()
            saved = end
    progress.bar.close()
    return saved


def finish(args, data, progress: Progress, check: Callable, store: Callable) -> None:
    """Check the last weights, and save them, or say which earlier ones are kept as the best."""
    if data.val:
        if not progress.checks or progress.checks[-1][1] != progress.step:
            check()
        print(f"validation off by ${progress.checks[-1][0]:.2f} on {len(data.val)} items")
    progress.judge()
    if args.keep == "last" or min(progress.checks)[1] == progress.step:
        progress.stop_clock()
        store()
    else:
        error, best = min(progress.checks)
        print(f"kept       step {best}, off by ${error:.2f}: the best of {len(progress.checks)} checks")


# ---- one run ---------------------------------------------------------------------------------------------------------


def train(args: argparse.Namespace, numerics: dict | None = None) -> None:
    """One member. `numerics`: what memory decided of an earlier part of the same run's numbers (run.json's `plan`)"""
    out, device, earlier = Path(args.out), pick_device(args.device), open_run(args.out) if args.resume else None
    if earlier and checkpoint.is_complete(out):
        return print(f"trained    {earlier['steps']:,} steps: {out}/ is complete")
    dtype = pick_dtype(args.dtype, device)
    torch.manual_seed(args.seed)

    # ---- data, tokens, batches
    config, tokenizer, directory = open_base(args.model)
    started_from = checkpoint.started_from(args.start_from, directory, earlier)
    data = load_training_data(args, earlier, started_from)
    print(data.describe())
    args.lr = args.lr or peak_rate(config.hidden_size)
    examples = data.encode(data.train, tokenizer, args)
    shape, tree = shape_of(examples, args.batch_tokens), PriceTree.build(tokenizer.encode_answer)
    answer = AnswerLoss(args.loss, tree, args.soft_width, device)
    if shape.longest > (known := config.max_position_embeddings):
        raise ValueError(f"{args.model} knows {known:,} positions, an item has {shape.longest:,}; lower --max-tokens")

    # ---- the model, quantised; what learns, as one flat vector; the step
    started = time.perf_counter()
    plan, reasons = plan_memory(args, config, shape, device, dtype, numerics)
    numerics = plan.numerics if plan else numerics or {"optimiser": args.optimiser, "head8": False}
    on_host = bool(plan and plan.host_embed)
    model, price_head = prepare_model(args, config, directory, device, dtype, examples, numerics, on_host)
    loss = JointLoss(answer, price_head, args.head_weight, shape.items) if price_head else answer
    flat = FlatParameter(lora_layers(model), list(price_head.parameters()) if price_head else [])
    optimiser = make_optimiser(numerics["optimiser"], flat.parameter, args.lr, args.weight_decay)
    path = fast.install(model, plan, flat, shape.tokens) if plan else READABLE
    run = TrainingRun(args, directory, data, model, price_head, flat, optimiser, numerics, started_from)
    loaded = f"loaded in {time.perf_counter() - started:.1f} s, peak {peak_memory(device):.2f} GiB"
    recorded = bool(plan) and args.graph == "auto" and fast.can_record(model)
    compute = partial(optimiser_step, model, loss, flat, optimiser, args.clip)
    take_step = make_step(compute, loss, flat, optimiser, shape, args.accumulate, recorded)

    # ---- how far, from where; the truth before anything is trained
    forward_passes = count_batches(examples, shape, args.seed, args.epochs)
    total = min(math.ceil(forward_passes / args.accumulate), args.max_steps or 10**12)
    counts, metrics = (load_state(out / "state", flat, optimiser), load_metrics(out)) if earlier else (None, [])
    done = counts["step"] * args.accumulate if earlier else 0
    # batches() never ends: cut to what this run still has to do.
    stream = islice(batches(examples, shape, args.seed, start=done), max(0, forward_passes - done))
    first = next(batches(examples, shape, args.seed))[0]
    path += ", one recorded CUDA graph a step" * recorded
    print_setup(run, tokenizer, examples, first, loss, total, loaded, path, reasons)
    progress = Progress(total, device, args.log_every, counts, metrics)

    def check() -> bool:
        error, guesses = validate(run, data.val, tokenizer, tree)
        return progress.check(error, len(data.val), guesses)

    def store() -> None:
        chosen = sample(data.all_val, MOST_CALIBRATION) if data.val else []  # for ranges that hold what they promise
        error, calibration = validate(run, chosen, tokenizer, tree) if chosen else (None, {})
        checkpoint.save(run, out, progress.counts, progress.metrics, calibration, error)

    # ---- steps; then a last check and the checkpoint
    with Stop("finishing this step, then saving") as stop, progress.bar:
        saved = loop(run, progress, take_step, stream, shape, stop, check, store)
        if stop.signal and progress.step < total:
            stop.leave(checkpoint.save_early(args, progress, saved, store))
        if saved != progress.step:  # a resumed run that was complete already has nothing to add
            finish(args, data, progress, check, store)
        checkpoint.mark_complete(out)
        stop.leave(f"{out}/ is complete")
    print(f"trained    {progress.step:,} steps in {progress.summary()}; checkpoint in {out}/")


def main(args: argparse.Namespace) -> None:
    """Train every member; the first is the checkpoint --out itself, the others lie in its members/."""
    with claimed(args):  # nobody else trains into --out meanwhile
        for member, numerics in members(args):
            train(member, numerics)
    print(f"now run    python evaluate.py --ckpt {args.out}/")


if __name__ == "__main__":
    run_main(lambda: main(ARGUMENTS))
