"""The work of the training benchmarks, and how a step of it is measured. Imported by train_speed.py and peers.py.

W8B, of every shape but one: sequences of 100 to 182 random tokens, loss on the last 4 of each, LoRA of rank 32 on
attention. A step is a fresh batch forward, backward and through AdamW. What is random here, the product has from real
texts of those lengths: speed does not depend on which tokens they are.
"""

import resource
import time
from argparse import Namespace
from dataclasses import dataclass
from typing import Callable

import torch
from torch import Tensor

GIB = 1 << 30


@dataclass(frozen=True)
class Workload:
    shortest: int  # tokens of a sequence
    longest: int  # tokens of a sequence, included
    supervised: int  # tokens at its end that carry the loss
    rank: int
    alpha: float
    targets: str  # as for train.py


W8B = Workload(shortest=100, longest=182, supervised=4, rank=32, alpha=64.0, targets="attention")
WORKLOADS = {"smollm2": Workload(40, 105, 6, rank=16, alpha=32.0, targets="all-linear")}  # texts of pc-parts


def random_sequences(work: Workload, vocabulary: int, steps: int, batch: int) -> list[list[list[int]]]:
    """(steps, batch, tokens): lengths and tokens uniform, always the same ones (seed 1)."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(work.shortest, work.longest + 1, (steps, batch), generator=generator).tolist()
    return [[torch.randint(vocabulary, (n,), generator=generator).tolist() for n in step] for step in lengths]


def packing(args: Namespace, vocabulary: int) -> tuple:
    """(list of pricing.prompt.Example, pricing.batch.Shape) of `ours`. As in train.py, whole sequences are packed into
    a fixed number of tokens: as many as `args.batch` sequences have on average, rounded up to 64."""
    from pricing.data.batch import shape_of  # here, and not in a peer's process
    from pricing.data.prompt import Example

    steps = 4 * (args.warmup + args.steps)
    pool = random_sequences(WORKLOADS.get(args.shape, W8B), vocabulary, steps, args.batch)
    pool = [ids for batch in pool for ids in batch]
    examples = [Example(ids[: -args.supervised], ids[-args.supervised :], 1.0) for ids in pool]
    return examples, shape_of(examples, -(-args.batch * sum(map(len, pool)) // len(pool) // 64) * 64)


def measure(args: Namespace, sequences: list[list[list[int]]], step: Callable[[int], Tensor], settings: str) -> dict:
    """Train on every batch and return what train_speed.py tabulates: the contract of `ours`, `peft`, ... is this dict.

    `step(n)` trains once on `sequences[n]` (forward, backward, optimiser, gradients cleared) and returns the mean loss
    over its supervised tokens, a tensor of one number. Whatever can be made ready before, a data loader would make
    ready: it belongs outside of `step`. `settings` says in a few words how it was run.

    settings       str
    step_ms        milliseconds of each timed step, synchronised
    tokens         real tokens of each timed step, padding not counted
    losses         nats, of every step, warm-up too: the first is that of the untrained model, the same for all
    peak_gib       most memory allocated during the timed steps (on a CPU: resident, since the start)
    first_step_s   seconds from the start of the process to the end of the first step: imports, loading, compiling
    """
    cuda = torch.cuda.is_available()
    losses, step_ms, first_step_s = [], [], 0.0
    for number in range(len(sequences)):
        if cuda and number == args.warmup:
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        loss = step(number)
        if cuda:
            torch.cuda.synchronize()
        step_ms.append(1000 * (time.perf_counter() - started))
        first_step_s = first_step_s or time.time() - args.started
        losses.append(loss.detach().clone())  # a captured graph writes each loss to the same place
    # Linux counts ru_maxrss in KiB.
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "settings": settings,
        "step_ms": step_ms[args.warmup :],
        "tokens": [sum(map(len, batch)) for batch in sequences[args.warmup :]],
        "losses": [float(loss) for loss in losses],
        "peak_gib": peak / GIB,
        "first_step_s": first_step_s,
    }
