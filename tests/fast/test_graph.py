"""A training step: windows, steps left out, and on a GPU the recorded step against the same lines run one by one."""

import json

import numpy as np
import pytest
import torch
from conftest import our_model, step_of
from test_families import FAMILIES, write_family

from fast.install import install
from fast.offload import Recompute
from fast.plan import Plan
from llama.attention import Layout
from llama.generate import prefill
from lora.inject import inject, lora_layers
from lora.optim import FlatParameter, initialise, make_optimiser
from pipeline.prediction import tree_functions
from pricing.data.batch import Shape, pack
from pricing.data.prompt import Example

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Loss:
    def prepare(self, batch):
        return {"targets": batch.targets}

    def supervised(self, batch):
        return int((batch.targets != -100).sum())

    def __call__(self, logits, arrays, states):
        return torch.nn.functional.cross_entropy(logits, arrays["targets"], reduction="sum", ignore_index=-100)


def examples(count, seed=0):
    rng = np.random.default_rng(seed)
    return [
        Example(rng.integers(0, 90, rng.integers(3, 20)).tolist(), rng.integers(0, 90, 3).tolist(), 1.0)
        for _ in range(count)
    ]


class Stepper:
    """A model in training, and its step: a function of (window, rate)"""

    def __init__(self, directory, shape, *, fast=True, optimiser="adamw", plan=Plan(), bits=4, **options):
        self.model, self.shape, self.loss = our_model(directory, bits=bits).to(DEVICE), shape, Loss()
        self.model.frequency = self.model.frequency.to(DEVICE)
        torch.manual_seed(0)
        inject(self.model, rank=4, alpha=8)
        self.flat = FlatParameter(lora_layers(self.model))
        if fast:
            install(self.model, plan, self.flat, shape.tokens)
        optimiser = make_optimiser(optimiser, self.flat.parameter, 1e-2, 0.0)
        self.step = step_of(self.model, self.loss, self.flat, optimiser, shape, **options)

    def __call__(self, window, rate):
        return self.step(window, rate)


def make_step(directory, shape, **options):
    step = Stepper(directory, shape, **options)
    return step, step.flat.parameter


def shape_for(tokens, items):
    return Shape(tokens, items, 22, items * 3)


def run(step, windows, rate=1e-2):
    return [step(window, rate)()[:2] for window in windows]  # loss and norm


def test_accumulating_equals_the_large_batch(tiny):
    """A mean over the window's supervised tokens, not a mean of means; a short last window too."""
    chosen = examples(16)
    large, moved = make_step(tiny[1], shape_for(512, 16))
    a = run(large, [[pack(chosen[:12], large.shape)], [pack(chosen[12:], large.shape)]])
    small, also = make_step(tiny[1], shape_for(128, 5), accumulate=3)
    parts = [chosen[:5], chosen[5:7], chosen[7:12]], [chosen[12:14], chosen[14:]]
    b = run(small, [[pack(part, small.shape) for part in window] for window in parts])
    np.testing.assert_allclose(a, b, rtol=1e-4)
    # Adam moves a number whose gradient is rounding noise by a whole rate: compare the whole vector, not each one.
    assert (moved - also).norm() < 1e-2 * moved.norm()


@pytest.mark.parametrize("fast", [False, True])
def test_the_loss_is_the_mean_over_the_supervised_tokens_of_the_window(tiny, fast):
    """In nats a token, of batches of different sizes; and the gradient is that mean's."""
    chosen = examples(9)
    step, parameter = make_step(tiny[1], shape_for(128, 6), fast=fast, accumulate=2)
    window = [pack(chosen[:6], step.shape), pack(chosen[6:], step.shape)]
    logits, targets = [], []
    for example in chosen:  # one by one, without packing
        tokens = torch.tensor(example.prompt + example.answer, device=DEVICE)
        layout = Layout.packed([len(tokens) - 1], DEVICE)
        logits.append(step.model(tokens[:-1], layout)[-len(example.answer) :])
        targets.append(tokens[-len(example.answer) :])
    expected = torch.nn.functional.cross_entropy(torch.cat(logits), torch.cat(targets))
    expected.backward()
    gradient = parameter.grad.clone()
    (loss, norm), *_ = run(step, [window], rate=0.0)
    assert loss == pytest.approx(expected.item(), rel=1e-4) and norm == pytest.approx(gradient.norm().item(), rel=1e-4)


@pytest.mark.parametrize("plan", [Plan(), Plan(keep=1), Plan(recompute=2), Plan(keep=2, recompute=1)])
def test_the_fast_path_learns_as_the_readable_one(tiny, plan):
    chosen, shape = examples(30), shape_for(128, 6)
    windows = [[pack(chosen[i : i + 5], shape)] for i in range(0, 30, 5)]
    results = []
    for fast in (False, True):
        step, parameter = make_step(tiny[1], shape, fast=fast, plan=plan if fast else Plan())
        results.append((run(step, windows), parameter.detach().clone()))
    np.testing.assert_allclose(results[0][0], results[1][0], rtol=1e-4)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["gemma2", "gemma3, 270M and 1B", "phi3, 128k"])
def test_the_fast_path_of_other_families_learns_as_the_readable_one(name, tmp_path):
    """On a GPU recorded: a lone kv head, norms of heads, windows, soft caps, two rotary tables, longrope"""
    write_family(name, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(FAMILIES[name]))
    chosen, shape = examples(30), shape_for(128, 6)
    windows = [[pack(chosen[i : i + 5], shape)] for i in range(0, 30, 5)]
    results = []
    for fast in (False, True):
        step, parameter = make_step(tmp_path, shape, fast=fast, recorded=fast and DEVICE.type == "cuda")
        results.append((run(step, windows), parameter.detach().clone()))
    np.testing.assert_allclose(results[0][0], results[1][0], rtol=1e-3)
    assert (results[0][1] - results[1][1]).norm() < 1e-2 * results[0][1].norm()


@pytest.mark.parametrize("optimiser", ["adamw", "sgd", "adamw8bit"])
def test_a_step_without_a_finite_gradient_leaves_the_weights(tiny, optimiser):
    shape = shape_for(128, 6)
    step, parameter = make_step(tiny[1], shape, optimiser=optimiser)
    window = [pack(examples(5), shape)]
    run(step, [window])
    before = parameter.detach().clone()
    weight = step.model.norm.weight.data.clone()
    step.model.norm.weight.data.fill_(float("nan"))
    loss, norm = run(step, [window])[0]
    assert not np.isfinite(loss) and torch.equal(parameter, before)
    step.model.norm.weight.data.copy_(weight)
    run(step, [window])
    assert torch.isfinite(parameter).all() and not torch.equal(parameter, before)


def test_an_idle_step_leaves_the_weights_and_counts_no_step(tiny):
    """As while a graph is being recorded: it computes all, and moves nothing."""
    from train import optimiser_step

    step, parameter = make_step(tiny[1], shape_for(128, 6))
    batch = pack(examples(5), step.shape)
    arrays = batch.arrays() | step.loss.prepare(batch)
    inputs = {k: v if isinstance(v, int) else torch.as_tensor(v).to(DEVICE) for k, v in arrays.items()}
    scalars = {name: torch.tensor(value, device=DEVICE) for name, value in (("rate", 1e-2), ("weight", 1e-2))}
    optimiser = make_optimiser("adamw", step.flat.parameter, 1e-2, 0.0)
    state, before = initialise(optimiser, parameter), parameter.detach().clone()
    for idle in (1.0, 0.0):
        scalars["idle"] = torch.tensor(idle, device=DEVICE)
        outcome = optimiser_step(step.model, step.loss, step.flat, optimiser, 1.0, [inputs], scalars)
        assert outcome.isfinite().all() and outcome.min() > 0
        assert torch.equal(parameter, before) == bool(idle) and state["step"] == 1 - idle


def test_recomputation_keeps_less_for_backward(tiny):
    """What autograd holds between forward and backward, counted tensor by tensor."""
    shape, held = shape_for(128, 6), []
    for blocks in (0, 2):
        step, _ = make_step(tiny[1], shape, plan=Plan(recompute=blocks))
        sizes = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: (sizes.__setitem__(t.data_ptr(), t.nbytes), t)[1], lambda t: t
        ):
            step([pack(examples(5), shape)], 0.0)()
        held.append(sum(sizes.values()))
    assert held[1] < 0.6 * held[0], held


@pytest.mark.skipif(DEVICE.type == "cpu", reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("optimiser", ["adamw", "sgd", "lion8bit"])
@pytest.mark.parametrize("plan", [Plan(), Plan(recompute=2, offload=True)])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_recorded_step_equals_its_lines_run_one_by_one(tiny, optimiser, plan, bits):
    chosen, shape = examples(30), shape_for(128, 6)
    windows = [[pack(chosen[i : i + 5], shape)] for i in range(0, 30, 5)]
    results = []
    for graph in (False, True):
        step, parameter = make_step(tiny[1], shape, recorded=graph, optimiser=optimiser, plan=plan, bits=bits)
        results.append((run(step, windows), parameter.detach().clone()))
    if bits == 8:  # gradients' sums differ in the last bit from run to run, which may move an input to the next code
        np.testing.assert_allclose(results[0][0], results[1][0], rtol=1e-2)
        assert (results[0][1] - results[1][1]).norm() < 0.05 * results[0][1].norm()
        return
    np.testing.assert_allclose(results[0][0], results[1][0], rtol=1e-4)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-3, atol=1e-4)


def test_blocks_behind_the_recomputed_ones_run_as_they_are():
    recompute, x = Recompute(1, False, (4, 4), DEVICE), torch.ones(4, 4, device=DEVICE, requires_grad=True)
    runs = []

    def block(x, delta):
        runs.append(delta)
        return (x if delta is None else x + delta).square(), None

    for number, times in ((0, 2), (1, 1)):  # forward and again in backward, or once
        runs.clear()
        recompute(number, block, x, x * 3)[0].sum().backward()
        assert len(runs) == times and (runs[0] is None) == (number == 0)


@pytest.mark.parametrize("clip", [1e-3, 1e3])
def test_the_gradient_is_clipped_by_its_norm(tiny, clip):
    shape = shape_for(128, 6)
    step, parameter = make_step(tiny[1], shape, optimiser="sgd", clip=clip)
    before = parameter.detach().clone()
    (_, norm), *_ = run(step, [[pack(examples(5), shape)]], rate=1.0)
    moved = (parameter - before).norm()  # the first step of SGD at rate 1 is the gradient itself
    torch.testing.assert_close(moved.item(), min(norm, clip), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("shared", [0, 1, 4, 5])
def test_what_all_prompts_begin_with_is_read_once(tiny, shared):
    model, every = our_model(tiny[1]), torch.arange(300)
    prompts = [[7] * shared + [10 + i, 3, i] for i in range(6)]
    shared_prefill, _ = tree_functions(model, prompts)
    log_probs, top, cache = shared_prefill(prompts, every)
    expected, expected_top, _ = prefill(model, prompts, every)
    torch.testing.assert_close(log_probs, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(top, expected_top) and cache.layout.columns == 3
