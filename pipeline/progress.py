"""How far a run is: its counts, the lines of metrics.jsonl, the bar, and what is said when a step or a check ends."""

import math
import sys
import time
from typing import Iterator, TypeVar

import numpy as np
import torch
from tqdm import tqdm

from pipeline.checkpoint import TrainingRun
from pipeline.models import memory_report, peak_memory
from pricing.data.prompt import Example, describe_cuts
from pricing.distribution.intervals import MIDDLE, in_dollars
from pricing.evaluation.console import show_example

TO_DO = "lower --lr, or check the data"
BAD_STEPS = 10  # in a row, without a finite loss: the run ends
T = TypeVar("T")


def one_behind(started: Iterator[T]) -> Iterator[T]:
    """Each item once the next one has been started: what is queued on a GPU is read while the next runs."""
    earlier = None
    for item in started:
        if earlier is not None:
            yield earlier
        earlier = item
    if earlier is not None:
        yield earlier


def print_setup(
    run: TrainingRun, tokenizer, examples: list[Example], first: Example, loss, total: int, loaded: str, path: str,
    reasons: list[str],
) -> None:  # fmt: skip
    """The truth, before anything is trained: which path runs, what lies where in memory, and the first item as it is
    learnt."""
    args, model = run.args, run.model
    print(
        f"model      {args.model} ({run.directory}) on {model.device}, {args.bits} bits, "
        f"computing in {str(model.compute_dtype).removeprefix('torch.')}; {loaded}"
    )
    fast = not path.startswith("readable")
    print(f"path       {path}" + "; --readable runs llama/model.py and quant/linear.py line by line" * fast)
    print(memory_report(model, run.price_head))
    for reason in reasons:
        print(f"memory     {reason}")
    lengths = [len(e.prompt) + len(e.answer) for e in examples]
    print(
        f"tokens     {sum(lengths):,} an epoch, {np.mean(lengths):.0f} an item, "
        f"of which {np.mean([loss.learnt(e) for e in examples]):.1f} carry the loss"
    )
    if cuts := describe_cuts(examples, args.max_tokens):
        print(f"           {cuts}")
    print(
        f"steps      {total:,} of {args.batch_tokens * args.accumulate:,} tokens at a peak rate of {args.lr:g}; "
        "first item, what is learnt in colour:"
    )
    print(show_example(first, tokenizer, loss.learnt(first)), flush=True)


class Progress:
    """`counts` (step, seconds, tokens) and `metrics`, a dict a line, of a run of `total` steps."""

    def __init__(self, total: int, device: torch.device, log_every: int, counts: dict | None, metrics: list[dict]):
        self.total, self.device, self.log_every = total, device, log_every
        self.counts = counts or {"step": 0, "seconds": 0.0, "tokens": 0, "finite": 0}
        self.counts.setdefault("finite", self.step)  # of versions that did not count them
        self.last_loss, self.at_bounds = None, None  # of the last step; where all guesses of the last check lie, if so
        self.metrics, self.bad_steps, self.note = metrics, 0, ""
        self.began = time.perf_counter() - self.seconds
        self.bar = tqdm(total=total, initial=self.step, unit="step", dynamic_ncols=True)

    @property
    def step(self) -> int:
        return self.counts["step"]

    @property
    def seconds(self) -> float:
        return self.counts["seconds"]

    @property
    def tokens(self) -> int:
        return self.counts["tokens"]

    @property
    def checks(self) -> list[tuple[float, int]]:
        """(dollars of validation error, step), in order"""
        return [(m["val_mae_dollars"], m["step"]) for m in self.metrics if "val_mae_dollars" in m]

    def elapsed(self) -> float:
        """Seconds since the run began, those before it was resumed included"""
        return time.perf_counter() - self.began

    def stop_clock(self) -> None:
        self.counts["seconds"] = self.elapsed()

    def report(self, step: int, rate: float, tokens: int, loss: float, norm: float, seconds: float) -> None:
        """Write down what a step gave. Raises ValueError where nothing has been finite for BAD_STEPS steps."""
        self.counts.update(step=step, seconds=self.elapsed(), tokens=self.tokens + tokens)
        finite, memory = math.isfinite(loss) and math.isfinite(norm), peak_memory(self.device)
        self.bad_steps, self.last_loss = 0 if finite else self.bad_steps + 1, loss
        self.counts["finite"] += finite
        if not finite:  # the step has left the weights as they were
            tqdm.write(f"step {step}: loss {loss}, gradient {norm}: not finite, left out", file=sys.stderr)
            if self.bad_steps == BAD_STEPS:
                raise ValueError("ten steps in a row without a finite loss: lower --lr, or check the data")
        if step % self.log_every == 0 or step == self.total:
            self.metrics.append({
                "step": step, "loss": round(loss, 5) if finite else None, "lr": rate,
                "grad_norm": round(norm, 4) if finite else None, "tokens": tokens,
                "tokens_per_second": round(tokens / seconds, 1), "peak_memory_gib": round(memory, 3),
            })  # fmt: skip
        speed = f"{tokens / seconds:,.0f} tokens/s, {memory:.2f} GiB"
        self.bar.set_postfix_str(f"loss {loss:.3f}{self.note}, {speed}", refresh=False)
        self.bar.update()

    def check(self, error: float, items: int, guesses: dict[str, np.ndarray] | None = None) -> bool:
        """Note the validation error of the weights of now, and whether their guesses (pipeline/prediction.py's
        `validate`) all lie at a bound. Are they the best so far?"""
        if guesses:
            guess, price = in_dollars(guesses["digits"][:, MIDDLE]), guesses["price"]
            where = {"$1": (guess < 1.5) & (price > 2), "$999": (guess > 998) & (price < 990)}
            self.at_bounds = next((bound for bound, at in where.items() if at.all()), None)
        self.metrics.append({"step": self.step, "val_mae_dollars": error})
        self.note = f", off by ${error:.2f} on {items} validation items"
        return min(self.checks)[1] == self.step

    def judge(self) -> None:
        """Say plainly where a run has learnt nothing. Raises ValueError where no step had a finite loss."""
        if self.step and not self.counts["finite"]:
            raise ValueError(f"nothing was learnt: none of the {self.step:,} steps had a finite loss; {TO_DO}")
        if self.last_loss is not None and not math.isfinite(self.last_loss):
            print(f"warning    nothing is learnt any more: the last step's loss is {self.last_loss}; {TO_DO}")
        if self.at_bounds:
            print(f"warning    nothing was learnt: every validation item is guessed at {self.at_bounds}; {TO_DO}")

    def summary(self) -> str:
        return f"{self.seconds:,.0f} s, {self.tokens / max(self.seconds, 1e-9):,.0f} tokens/s over all"

    def since_best(self) -> int:
        """Checks since the best one"""
        return len(self.checks) - 1 - self.checks.index(min(self.checks))
