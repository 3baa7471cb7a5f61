"""A training step as one recorded CUDA graph: the plain lines of train.py, recorded once and replayed by one call.

    python -m pytest tests/fast/test_graph.py       # on a GPU: the recorded step against its lines run one by one

A step of a small model is thousands of kernels of a few microseconds each, and Python needs longer than that to
launch one: the GPU waits. A CUDA graph records the launches once (forward, backward, clipping, optimiser) and replays
them together. It replays on the same memory, so all arrays keep their sizes (whole items are packed into a fixed number
of tokens), and each batch is copied into the same place: `StaticInputs`. Nothing in a step waits for the GPU: what it
gave is read (`Outcome`) while the next one runs.
"""

from typing import Callable

import numpy as np
import torch
from torch import Tensor

Arrays = dict[str, np.ndarray | np.number | int]


class StaticInputs:
    """Fixed arrays on the device, and two pinned copies on the host: one is filled while the other travels. Python ints
    stay what they were when the step was recorded."""

    def __init__(self, arrays: Arrays, device: torch.device):
        self.fixed = {k: v for k, v in arrays.items() if isinstance(v, int)}
        tensors = {k: torch.as_tensor(v) for k, v in arrays.items() if k not in self.fixed}
        self.on_device = {k: t.to(device, copy=True) for k, t in tensors.items()}
        pinned = device.type == "cuda"
        self.hosts = [{k: torch.empty_like(t, pin_memory=pinned) for k, t in tensors.items()} for _ in range(2)]
        self.sent = [torch.cuda.Event() for _ in range(2)] if pinned else None
        self.turn = 0

    @property
    def inputs(self) -> dict[str, Tensor | int]:
        return self.fixed | self.on_device

    def push(self, arrays: Arrays) -> None:
        """Copy to the device, without waiting"""
        self.turn = 1 - self.turn
        if self.sent:
            self.sent[self.turn].synchronize()  # this copy's last journey; long over
        for key, tensor in self.on_device.items():
            self.hosts[self.turn][key].copy_(torch.as_tensor(arrays[key]))
            tensor.copy_(self.hosts[self.turn][key], non_blocking=True)
        if self.sent:
            self.sent[self.turn].record()


class Outcome:
    """What a step gave: (loss, norm of the gradient, seconds). Called, it waits for the step."""

    def __init__(self, outcome: Tensor, started: torch.cuda.Event):
        self.started, self.ended = started, torch.cuda.Event(enable_timing=True)
        self.host = torch.empty(2, pin_memory=True)
        self.host.copy_(outcome, non_blocking=True)
        self.ended.record()

    def __call__(self) -> tuple[float, float, float]:
        self.ended.synchronize()
        return *self.host.tolist(), self.started.elapsed_time(self.ended) / 1000


class RecordedStep:
    """`compute(window, scalars) -> (2,)`, recorded. `window` is a list of dicts of tensors and ints, one a batch.

    `empty` is a batch without items, of the arrays' final sizes: the step is warmed up and recorded with it, and a
    short last window is filled up with it. Warming up, `scalars["idle"]` is 1: `compute` leaves the weights alone.
    """

    def __init__(self, compute: Callable, empty: Arrays, accumulate: int, scalars: Arrays, device: torch.device):
        self.compute, self.empty = compute, empty
        self.window = [StaticInputs(empty, device) for _ in range(accumulate)]
        self.scalars = StaticInputs(scalars | {"idle": np.float32(1)}, device)
        self.graph, self.outcome = self.record()

    def run(self) -> Tensor:
        return self.compute([batch.inputs for batch in self.window], self.scalars.inputs)

    def record(self) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """Warm up (compile, choose kernels) with empty batches that move nothing, then record."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self.run()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            outcome = self.run()
        return graph, outcome

    def __call__(self, window: list[Arrays], scalars: Arrays) -> Outcome:
        """Queue one step; at most `accumulate` batches, fewer at the end of an epoch. Returns at once."""
        started = torch.cuda.Event(enable_timing=True)
        started.record()
        self.scalars.push(scalars | {"idle": np.float32(0)})
        for number, batch in enumerate(self.window):
            batch.push(window[number] if number < len(window) else self.empty)
        self.graph.replay()
        return Outcome(self.outcome, started)
