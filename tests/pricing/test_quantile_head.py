"""The price head: the loss, the order of its quantiles, what it learns, what flows back, its file."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pricing.data.batch import Shape, pack
from pricing.data.prompt import Example
from pricing.distribution.intervals import LEVELS, MIDDLE, central_range
from pricing.distribution.quantile_head import (
    FILE,
    JointLoss,
    PriceHead,
    load_head,
    new_price_head,
    ordered,
    pinball,
    price_head_parameters,
    save_head,
)

ROOT = Path(__file__).resolve().parents[2]


def numbers(*shape: int, seed: int = 0, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture(scope="module")
def known_law():
    """log price = 4 + x0 / 2 + (0.5 + 0.2 tanh(x1)) e, e normal; the other three states say nothing."""
    rng = np.random.default_rng(0)
    states = rng.normal(size=(6000, 5))
    width = 0.5 + 0.2 * np.tanh(states[:, 1])
    log_price = 4 + 0.5 * states[:, 0] + width * rng.normal(size=6000)
    # States of another scale and place, as a network's are: the head has to standardise them.
    return np.exp(log_price), states * 50 + 300, width


@pytest.fixture(scope="module")
def fitted(known_law):
    """A head of 32 hidden units trained by the pinball loss on the first 4,000 items, 12 times over"""
    prices, states = known_law[0][:4000], torch.tensor(known_law[1][:4000], dtype=torch.float32)
    torch.manual_seed(0)
    head = PriceHead(5, 32, {"states": "tuned", "joint": True})
    head.start(prices)
    head.mean.copy_(states.mean(0))
    head.spread.copy_(states.std(0))
    target = ((torch.log(torch.tensor(prices)) - head.price_mean) / head.price_spread).float()
    optimiser = torch.optim.AdamW(head.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=3e-3, total_steps=600, pct_start=0.1)
    for _ in range(12):
        for rows in torch.randperm(4000).split(80):
            loss = pinball(head(states[rows]), target[rows], torch.tensor(LEVELS)).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    return head


def test_pinball_by_its_definition():
    quantiles, truth, levels = [[1.0, 2.0, 4.0], [0.0, 0.5, 0.5]], [3.0, -1.0], [0.1, 0.5, 0.9]
    total = 0.0
    for row, y in zip(quantiles, truth, strict=True):
        for f, q in zip(row, levels, strict=True):
            total += q * (y - f) if y >= f else (1 - q) * (f - y)
    assert total > 1
    scores = pinball(torch.tensor(quantiles), torch.tensor(truth), torch.tensor(levels))
    assert scores.shape == (2,) and float(scores.mean()) == pytest.approx(total / 6)


def test_the_constant_with_the_least_pinball_loss_is_the_quantile():
    truth = numbers(2001, seed=1, dtype=torch.float64)
    for level in (0.05, 0.5, 0.9):
        grid = torch.linspace(-3, 3, 1201, dtype=torch.float64)
        losses = torch.stack([pinball(f.expand(2001, 1), truth, torch.tensor([level]).double()).mean() for f in grid])
        assert float(grid[losses.argmin()]) == pytest.approx(float(truth.quantile(level)), abs=0.01)


def test_gradient_of_the_loss_through_the_ordered_quantiles():
    raw, truth = numbers(4, len(LEVELS), dtype=torch.float64).requires_grad_(), numbers(4, seed=2, dtype=torch.float64)
    levels = torch.tensor(LEVELS, dtype=torch.float64)
    pinball(ordered(raw), truth, levels).mean().backward()
    step = 1e-6
    for row, column in [(0, 0), (1, 5), (2, MIDDLE), (3, 13), (0, 18)]:
        ends = []
        for sign in (1, -1):
            moved = raw.detach().clone()
            moved[row, column] += sign * step
            ends.append(float(pinball(ordered(moved), truth, levels).mean()))
        assert float(raw.grad[row, column]) == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-4, abs=1e-9)


def test_quantiles_never_cross_and_the_middle_one_is_free():
    raw = 20 * numbers(500, len(LEVELS))
    quantiles = ordered(raw)
    assert (quantiles.diff(dim=1) >= 0).all()
    assert torch.equal(quantiles[:, MIDDLE], raw[:, MIDDLE])
    assert LEVELS[MIDDLE] == 0.5 and len(LEVELS) == 21
    one = raw.clone()
    one[:, MIDDLE + 1] += 1  # the first gap upwards lifts all above, and nothing below
    moved = ordered(one) - quantiles
    assert (moved[:, : MIDDLE + 1] == 0).all() and (moved[:, MIDDLE + 1 :] >= 0).all() and moved.max() > 0.5


def test_a_new_head_begins_with_the_quantiles_of_a_normal_distribution():
    torch.manual_seed(0)
    head = PriceHead(6, 16)
    head.start(np.array([10.0, 80.0, 640.0]))
    with torch.no_grad():
        head.network[-1].weight.zero_()
    expected = 0.5 * torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(LEVELS))
    torch.testing.assert_close(head(numbers(3, 6)), expected.expand(3, -1), rtol=1e-4, atol=1e-5)
    log_price = np.log(80) + np.std(np.log([10, 80, 640])) * expected.numpy()
    np.testing.assert_allclose(head.quantiles(numbers(3, 6)), np.tile(log_price, (3, 1)), atol=1e-4)


def test_it_recovers_the_conditional_quantiles_of_a_known_law(known_law, fitted):
    _, states, width = known_law
    rows = np.arange(5000, 6000)
    quantiles = fitted.quantiles(states[rows])
    assert (np.diff(quantiles, axis=1) >= 0).all()
    normal = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(LEVELS)).numpy()
    centre = 4 + 0.5 * (states[rows, 0] - 300) / 50
    expected = centre[:, None] + width[rows, None] * normal
    error = np.abs(quantiles - expected)  # in log price, of quantiles up to 1.4 from the median
    assert error[:, MIDDLE].mean() < 0.06 and error.mean() < 0.09
    spread = (quantiles[:, -1] - quantiles[:, 0]) / (expected[:, -1] - expected[:, 0])
    for part in (width[rows] < 0.4, width[rows] > 0.6):  # of these, the mean widths are 0.35 and 0.65
        assert 0.85 < spread[part].mean() < 1.15


def test_ranges_hold_as_many_prices_as_they_promise(known_law, fitted):
    prices, states, _ = known_law
    truth = prices[5000:]
    for share in (0.8, 0.5):
        low, high = central_range(fitted.quantiles(states[5000:]), share)
        assert np.mean((low <= truth) & (truth <= high)) == pytest.approx(share, abs=0.05)
        assert (low <= fitted.median(states[5000:])).all() and (fitted.median(states[5000:]) <= high).all()


def test_saved_and_loaded_it_is_the_same_to_the_bit(fitted, known_law, tmp_path):
    path = save_head(fitted, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [FILE] == [path.name]
    loaded = load_head(tmp_path)
    assert loaded.settings == fitted.settings == {"states": "tuned", "joint": True}
    x = known_law[1][:200]
    assert np.array_equal(loaded.quantiles(x), fitted.quantiles(x))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    with safe_open(path, framework="pt") as file:
        layers = [f"members.0.read.{layer}.{kind}" for layer in (0, 3, 6) for kind in ("weight", "bias")]
        assert set(file.keys()) == {"mean", "spread", "price_mean", "price_spread", *layers}
        shape = json.loads(file.metadata()["head"])["shape"]
    assert shape == {"inputs": 5, "width": 32, "members": 1}


def earlier_file(directory, settings):
    """head.safetensors as the versions before wrote it, beside the quantiles that it gives for `states`"""
    rng = np.random.default_rng(0)
    sizes = {"0": (8, 5), "3": (8, 8), "6": (21, 8)}
    tensors = {f"members.0.read.{n}.weight": torch.tensor(rng.normal(size=size)) for n, size in sizes.items()}
    tensors |= {f"members.0.read.{n}.bias": torch.tensor(rng.normal(size=size[0])) for n, size in sizes.items()}
    tensors |= {"mean": torch.ones(5), "spread": torch.full((5,), 2.0)}
    tensors |= {"price_mean": torch.tensor(4.0), "price_spread": torch.tensor(0.5)}
    tensors = {name: value.float() for name, value in tensors.items()}
    metadata = {"shape": {"inputs": 5, "width": 8, "members": 1}, "settings": settings}
    save_file(tensors, directory / FILE, metadata={"head": json.dumps(metadata)})
    states = rng.normal(size=(7, 5)).astype(np.float32)
    raw = (states - 1) / 2
    for n in sizes:
        raw = raw @ tensors[f"members.0.read.{n}.weight"].numpy().T + tensors[f"members.0.read.{n}.bias"].numpy()
        raw = raw if n == "6" else np.maximum(raw, 0)
    gaps = np.log1p(np.exp(raw))
    below = [raw[:, 10] - gaps[:, n:10].sum(1) for n in range(10)]
    above = [raw[:, 10] + gaps[:, 11 : n + 1].sum(1) for n in range(11, 21)]
    return states, 4 + 0.5 * np.stack([*below, raw[:, 10], *above], axis=1)


def test_heads_of_earlier_versions_load_if_they_were_trained_with_the_adapter(tmp_path):
    states, expected = earlier_file(tmp_path, {"states": "tuned", "blocks": [2], "mean": False, "joint": True})
    head = load_head(tmp_path)
    np.testing.assert_allclose(head.quantiles(states), expected, rtol=1e-5, atol=1e-5)
    before = load_file(tmp_path / FILE)
    save_head(head, tmp_path)
    assert {name: value.tolist() for name, value in load_file(tmp_path / FILE).items()} == {
        name: value.tolist() for name, value in before.items()
    }
    earlier_file(tmp_path, {"states": "both", "blocks": [1, 2], "mean": True})
    with pytest.raises(ValueError, match="was trained after its run, which .*: train again with") as error:
        load_head(tmp_path)
    assert str(tmp_path / FILE) in str(error.value) and "\n" not in str(error.value)


def test_the_command_that_trained_a_head_afterwards_says_what_does_now():
    command = [sys.executable, "-m", "pricing.head", "--ckpt", "out", "--states", "both"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2 and not result.stdout
    assert result.stderr.count("\n") == 1 and "by train.py --head quantile" in result.stderr


def test_bad_input_is_one_clear_line(fitted, tmp_path):
    with pytest.raises(ValueError, match="has no price head: it is trained with the adapter, by train.py --head quan"):
        load_head(tmp_path)
    with pytest.raises(ValueError, match=r"reads 5 numbers an item, the states are \(3, 6\): another base model"):
        fitted.median(np.zeros((3, 6)))
    assert fitted.quantiles(np.zeros((0, 5))).shape == (0, 21)
    whole = save_head(fitted, tmp_path).read_bytes()
    for damaged in (
        whole[:-100], b"", whole.replace(b'"head"', b'"tail"'), whole.replace(b"members.0.read.3", b"members.0.read.4")
    ):  # fmt: skip
        (tmp_path / FILE).write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged or of another version") as error:
            load_head(tmp_path)
        assert "\n" not in str(error.value)


# ---- trained with the adapter ----------------------------------------------------------------------------------------


class NoAnswer:
    """In place of the loss of the answer's tokens: 7 nats"""

    learnt = supervised = None

    def prepare(self, batch):
        return {"targets": batch.targets}

    def __call__(self, logits, prepared):
        return torch.tensor(7.0)


def joint_parts(width=6, items=5):
    """(loss, states (M, C), a batch of three items, its arrays, the states of their first answer positions)"""
    shape = Shape(60, items, 20, items * 4)
    examples = [Example([1] * n, [2] * m, price) for n, m, price in ((5, 4, 12.5), (9, 2, 300.0), (3, 3, 40.0))]
    batch = pack(examples, shape)
    torch.manual_seed(0)
    head = new_price_head(np.array([10.0, 80.0, 640.0]), width, 2.0, {}, "cpu")
    loss = JointLoss(NoAnswer(), head, 3.0, items)
    states = numbers(len(batch.targets), width).requires_grad_()
    arrays = {key: torch.as_tensor(value) for key, value in loss.prepare(batch).items()}
    return loss, states, batch, arrays, states[[0, 4, 6]]


def test_joint_loss_is_the_pinball_loss_of_each_items_first_position():
    loss, states, batch, arrays, first = joint_parts()
    head = loss.head
    quantiles = head.quantiles(first.detach())  # log dollars
    units = (quantiles - float(head.price_mean)) / float(head.price_spread)
    expected = 7.0
    for row, price in zip(units, (12.5, 300.0, 40.0), strict=True):
        y = (np.log(price) - np.log(80)) / np.std(np.log([10, 80, 640]))
        expected += 3.0 * np.mean([max(q * (y - f), (q - 1) * (y - f)) for q, f in zip(LEVELS, row, strict=True)])
    assert loss(None, arrays, states).item() == pytest.approx(expected, rel=1e-5)
    assert (batch.targets != -100).sum() == 9 and len(arrays["first"]) == 5  # two places of the arrays hold no item


def test_joint_loss_flows_into_the_states_of_those_positions_and_no_other():
    loss, states, _, arrays, _ = joint_parts()
    loss(None, arrays, states).backward()
    moved = states.grad.abs().sum(1) > 0
    assert moved.nonzero().flatten().tolist() == [0, 4, 6]
    empty = {key: torch.as_tensor(value) for key, value in loss.prepare(pack([], Shape(60, 5, 20, 20))).items()}
    states.grad = None
    loss(None, empty, states).backward()
    assert loss(None, empty, states).item() == 7 and states.grad.abs().sum() == 0


def test_a_price_head_has_the_numbers_that_memory_is_planned_for():
    head = new_price_head(np.ones(3), 72, 1.0, {}, "cpu")
    assert sum(parameter.numel() for parameter in head.parameters()) == price_head_parameters(72)
