"""One optimiser step, as plain PyTorch or as one recorded CUDA graph; both run the very same lines, `Step.compute`.

A step of a small model is thousands of kernels of a few microseconds each, and Python needs longer than that to
launch one: the GPU waits. A CUDA graph records the launches once (forward, backward, clipping, optimiser) and replays
them by a single call. It replays on the same memory, so all arrays keep their sizes (pricing/batch.py) and each batch
is copied into the same place. Nothing in a step waits for the GPU: its loss is read while the next one runs.
"""

import time

import numpy as np
import torch
from torch import Tensor

from fast.linears import Group
from llama.attention import Layout
from lora.optim import FlatFactors, capturable, initialise
from pricing.data.batch import Batch, Shape, pack


class Feed:
    """Fixed arrays on the device, and two pinned copies on the host: one is filled while the other travels."""

    def __init__(self, arrays: dict[str, np.ndarray], device: torch.device):
        self.on_device = {k: torch.as_tensor(v).to(device, copy=True) for k, v in arrays.items()}
        pinned = device.type == "cuda"
        self.hosts = [
            {k: torch.empty_like(t, device="cpu", pin_memory=pinned) for k, t in self.on_device.items()}
            for _ in range(2)
        ]
        self.sent = [torch.cuda.Event() for _ in range(2)] if pinned else None
        self.turn = 0

    def push(self, arrays: dict[str, np.ndarray]) -> None:
        self.turn = 1 - self.turn
        if self.sent:
            self.sent[self.turn].synchronize()  # this copy's last journey; long over
        for key, value in arrays.items():
            self.hosts[self.turn][key].copy_(torch.as_tensor(value))
            self.on_device[key].copy_(self.hosts[self.turn][key], non_blocking=True)
        if self.sent:
            self.sent[self.turn].record()


class Step:
    """Forward and backward of a window of batches, clipping, update.

    `groups` are quant.fast's for the fast path, empty for the readable one. `graph` records and replays (CUDA only).
    """

    def __init__(
        self, model, loss, factors: FlatFactors, optimiser, groups: list[Group], shape: Shape, *,
        accumulate: int, clip: float, graph: bool,
    ):  # fmt: skip
        self.model, self.loss, self.factors, self.optimiser = model, loss, factors, optimiser
        self.groups, self.shape, self.clip = groups, shape, clip
        self.device = factors.parameter.device
        initialise(optimiser, factors.parameter)
        arrays = self.unpack(pack([], shape))
        self.feeds = [Feed(arrays, self.device) for _ in range(accumulate)]
        self.rows = [shape.sequences] * accumulate  # of the readable attention's grid (slots); the kernels have edges
        # rate, 1 / supervised tokens, and whether to leave the weights alone whatever comes out
        self.scalars = Feed({"rate": np.float32(0), "weight": np.float32(1), "idle": np.float32(1)}, self.device)
        self.outcome = torch.zeros(2, device=self.device)  # loss in nats a supervised token, norm of the gradient
        self.in_graph = capturable(optimiser)
        self.replay = None
        if graph:
            self.record()

    def unpack(self, batch: Batch) -> dict[str, np.ndarray]:
        fixed = {"tokens": batch.tokens, "positions": batch.positions, "slots": batch.slots, "at": batch.at}
        return fixed | {"edges": batch.edges.astype(np.int32)} | self.loss.prepare(batch)

    def compute(self) -> None:
        """Everything a step does on the device. Called as it is, or recorded."""
        gradient, scalars = self.factors.parameter.grad, self.scalars.on_device
        gradient.zero_()
        total = torch.zeros((), device=self.device)
        for feed, rows in zip(self.feeds, self.rows, strict=True):
            if self.groups:
                self.factors.spread(self.groups, self.model.compute_dtype)
            arrays = feed.on_device
            layout = Layout(arrays["positions"], rows, self.shape.longest, arrays["slots"], edges=arrays["edges"])
            states = self.model.hidden_states(arrays["tokens"], layout, at=arrays["at"])  # (M, C)
            # A sum in nats times one weight for the whole window: a mean of means would weigh short batches more.
            loss = self.loss(self.model.head(states), arrays, states) * scalars["weight"]
            loss.backward()
            total += loss.detach()
        self.factors.gather(self.groups)
        norm = gradient.norm()
        gradient.mul_(self.clip / norm.clamp(min=self.clip))
        self.outcome.copy_(torch.stack([total, norm]))
        if self.in_graph:
            # PyTorch's fused optimisers do nothing, and count no step, where found_inf is 1.
            self.optimiser.found_inf = torch.maximum(1 - self.outcome.isfinite().all().float(), scalars["idle"])
            self.optimiser.param_groups[0]["lr"] = scalars["rate"]
            self.optimiser.step()

    def record(self) -> None:
        """Warm up (compile, choose kernels) with an empty batch that moves nothing, then record."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self.compute()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            self.compute()
        self.replay = graph.replay

    def __call__(self, window: list[Batch], rate: float) -> "Outcome":
        """Queue one step; at most `accumulate` batches, fewer at the end of a run. Returns at once."""
        clock = Clock(self.device)
        supervised = sum(self.loss.supervised(batch) for batch in window)  # tokens that carry loss
        self.scalars.push({"rate": np.float32(rate), "weight": np.float32(1 / supervised), "idle": np.float32(0)})
        for number, feed in enumerate(self.feeds):
            batch = window[number] if number < len(window) else pack([], self.shape)
            self.rows[number] = batch.rows
            feed.push(self.unpack(batch))
        (self.replay or self.compute)()
        outcome = Outcome(self.outcome, clock)
        if not self.in_graph:
            for group in self.optimiser.param_groups:
                group["lr"] = rate
            if outcome.finite:  # waits for the step: the 8-bit optimisers take their numbers from Python
                self.optimiser.step()
        return outcome


class Clock:
    """Seconds of device time from its making to `stop`; reading them waits for the device."""

    def __init__(self, device: torch.device):
        self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if device.type == "cuda" else None
        self.times = [time.perf_counter()]
        if self.events:
            self.events[0].record()

    def stop(self) -> None:
        self.times.append(time.perf_counter())
        if self.events:
            self.events[1].record()

    @property
    def seconds(self) -> float:
        if not self.events:
            return self.times[1] - self.times[0]
        self.events[1].synchronize()
        return self.events[0].elapsed_time(self.events[1]) / 1000


class Outcome:
    """What a step gave. Reading it waits for the step."""

    def __init__(self, outcome: Tensor, clock: Clock):
        self.host = torch.empty(2, pin_memory=outcome.is_cuda)
        self.host.copy_(outcome, non_blocking=outcome.is_cuda)
        self.clock = clock
        clock.stop()

    def read(self) -> tuple[float, float, float]:
        """Loss (nats a supervised token), norm of the gradient (before clipping), seconds of the step"""
        seconds = self.clock.seconds
        return *self.host.tolist(), seconds

    @property
    def finite(self) -> bool:
        return all(np.isfinite(self.read()))
