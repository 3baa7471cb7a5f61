"""How train.py's optimiser_step is run: at once, line by line, or recorded and replayed by fast/graph.py."""

import math
import time
from functools import partial
from typing import Callable

import numpy as np
import torch

from lora.optim import FlatParameter, capturable, initialise
from pipeline.models import fast
from pricing.data.batch import Shape, pack


def run_plainly(compute: Callable, device: torch.device, window: list[dict], scalars: dict) -> Callable:
    """Run `compute` now; returns a function that gives (loss, norm, seconds), as a recorded step does."""

    def on_device(arrays: dict) -> dict:
        return {k: v if isinstance(v, int) else torch.as_tensor(v).to(device) for k, v in arrays.items()}

    started = time.perf_counter()
    outcome = compute([on_device(batch) for batch in window], on_device(scalars | {"idle": np.float32(0)}))
    outcome = (*outcome.tolist(), time.perf_counter() - started)
    return lambda: outcome


def make_step(
    compute: Callable, loss, flat: FlatParameter, optimiser, shape: Shape, accumulate: int, recorded: bool
) -> Callable:
    """A function of (window of packed batches, rate) that takes one optimiser step, or queues it; it returns a function
    that waits for the step and gives (loss in nats a supervised token, norm of the gradient, seconds).

    `compute(window, scalars) -> (2,)` is train.py's optimiser_step; `recorded` replays it as a CUDA graph, of windows
    of at most `accumulate` batches.
    """
    device = flat.parameter.device
    initialise(optimiser, flat.parameter)
    step = partial(run_plainly, compute, device)
    if recorded:
        empty, scalars = pack([], shape), {"rate": np.float32(0), "weight": np.float32(1)}
        arrays = empty.arrays() | loss.prepare(empty) | {"rows": shape.sequences}
        step = fast.RecordedStep(compute, arrays, accumulate, scalars, device)

    def take_step(window: list, rate: float) -> Callable:
        supervised = sum(loss.supervised(batch) for batch in window)  # tokens that carry loss
        scalars = {"rate": np.float32(rate), "weight": np.float32(1 / supervised)}
        read = step([batch.arrays() | loss.prepare(batch) for batch in window], scalars)
        if not capturable(optimiser):  # the 8-bit optimisers take rate and step number from Python: wait for the loss
            optimiser.param_groups[0]["lr"] = rate
            if all(map(math.isfinite, read()[:2])):
                optimiser.step()
        return read

    return take_step
