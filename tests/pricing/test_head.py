"""The head, trained with the adapter or on frozen states: the loss, the order of its quantiles, what it learns from,
what it is saved as."""

import hashlib
import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import our_model
from safetensors import safe_open
from safetensors.torch import load_file
from test_end_to_end import run

from pipeline.predictor import forecast, open_head
from pipeline.states import head_states, kept_states, last_states, without_adapter
from pricing.data.batch import Shape, pack
from pricing.data.items import Item
from pricing.data.prompt import Example
from pricing.distribution.decode import PriceTree
from pricing.distribution.intervals import LEVELS, MIDDLE, central_range, in_dollars
from pricing.distribution.quantile_head import (
    FILE,
    Head,
    JointLoss,
    Member,
    Recipe,
    fit_head,
    joint_head,
    joint_numbers,
    load_head,
    ordered,
    pinball,
    save_head,
)

SMALL = Recipe(width=32, members=2, epochs=12, dropout=0.0, lr=3e-3)


def numbers(*shape: int, seed: int = 0, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def items_of(prices, splits) -> list[Item]:
    pairs = enumerate(zip(prices, splits, strict=True))
    return [Item(str(n), f"t{n}", f"t{n}", float(price), "", split) for n, (price, split) in pairs]


def same(one: Head, other: Head) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.fixture(scope="module")
def known_law():
    """log price = 4 + x0 / 2 + (0.5 + 0.2 tanh(x1)) e, e normal; the other three states say nothing."""
    rng = np.random.default_rng(0)
    states = rng.normal(size=(6000, 5))
    width = 0.5 + 0.2 * np.tanh(states[:, 1])
    log_price = 4 + 0.5 * states[:, 0] + width * rng.normal(size=6000)
    splits = ["train"] * 4000 + ["val"] * 1000 + ["test"] * 1000
    # States of another scale and place, as a network's are: the head has to standardise them.
    return items_of(np.exp(log_price), splits), states * 50 + 300, width


@pytest.fixture(scope="module")
def fitted(known_law):
    items, states, _ = known_law
    return fit_head(items, states, SMALL, settings={"states": "tuned"})


def test_pinball_by_its_definition():
    quantiles, truth, levels = [[1.0, 2.0, 4.0], [0.0, 0.5, 0.5]], [3.0, -1.0], [0.1, 0.5, 0.9]
    total = 0.0
    for row, y in zip(quantiles, truth, strict=True):
        for f, q in zip(row, levels, strict=True):
            total += q * (y - f) if y >= f else (1 - q) * (f - y)
    assert total > 1
    found = pinball(torch.tensor(quantiles), torch.tensor(truth), torch.tensor(levels))
    assert found.shape == (2,) and float(found.mean()) == pytest.approx(total / 6)


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
    found = ordered(raw)
    assert (found.diff(dim=1) >= 0).all()
    assert torch.equal(found[:, MIDDLE], raw[:, MIDDLE])
    assert LEVELS[MIDDLE] == 0.5 and len(LEVELS) == 21
    one = raw.clone()
    one[:, MIDDLE + 1] += 1  # the first gap upwards lifts all above, and nothing below
    moved = ordered(one) - found
    assert (moved[:, : MIDDLE + 1] == 0).all() and (moved[:, MIDDLE + 1 :] >= 0).all() and moved.max() > 0.5


def test_a_new_network_begins_with_the_quantiles_of_a_normal_distribution():
    torch.manual_seed(0)
    member = Member(6, 16)
    member.start()
    with torch.no_grad():
        member.read[-1].weight.zero_()
    expected = 0.5 * torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(LEVELS))
    torch.testing.assert_close(member(numbers(3, 6)), expected.expand(3, -1), rtol=1e-4, atol=1e-5)


def test_it_recovers_the_conditional_quantiles_of_a_known_law(known_law, fitted):
    items, states, width = known_law
    rows = np.arange(5000, 6000)
    found = fitted.quantiles(states[rows])
    assert (np.diff(found, axis=1) >= 0).all()
    normal = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(LEVELS)).numpy()
    centre = 4 + 0.5 * (states[rows, 0] - 300) / 50
    expected = centre[:, None] + width[rows, None] * normal
    error = np.abs(found - expected)  # in log price, of quantiles up to 1.4 from the median
    assert error[:, MIDDLE].mean() < 0.06 and error.mean() < 0.09
    spread = (found[:, -1] - found[:, 0]) / (expected[:, -1] - expected[:, 0])
    for part in (width[rows] < 0.4, width[rows] > 0.6):  # of these, the mean widths are 0.35 and 0.65
        assert 0.85 < spread[part].mean() < 1.15


def test_ranges_hold_as_many_prices_as_they_promise(known_law, fitted):
    items, states, _ = known_law
    truth = np.array([item.price for item in items[5000:]])
    for share in (0.8, 0.5):
        low, high = central_range(fitted.quantiles(states[5000:]), share)
        assert np.mean((low <= truth) & (truth <= high)) == pytest.approx(share, abs=0.05)
        assert (low <= fitted.median(states[5000:])).all() and (fitted.median(states[5000:]) <= high).all()


def test_the_same_seed_gives_the_same_head_and_leaves_the_callers_random_numbers(known_law):
    items, states, _ = known_law
    recipe, rows = Recipe(width=8, members=1, epochs=2), [*range(300), *range(4000, 4100)]
    items, states = [items[row] for row in rows], states[rows]
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one = fit_head(items, states, recipe)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(6)
    two = fit_head(items, states, recipe)
    assert same(one, two)
    other = fit_head(items, states, Recipe(width=8, members=1, epochs=2, seed=1))
    assert not np.array_equal(one.median(states), other.median(states))


def test_members_are_averaged_in_log_price(fitted, known_law):
    x = known_law[1][:20]
    alone = []
    for n in range(2):
        head = Head(fitted.inputs, SMALL.width, 1)
        head.load_state_dict(
            {k.replace(f"members.{n}.", "members.0."): v for k, v in fitted.state_dict().items()
             if not k.startswith("members.") or k.startswith(f"members.{n}.")}
        )  # fmt: skip
        alone.append(head.quantiles(x))
    assert not np.allclose(alone[0], alone[1])  # two seeds, two networks
    np.testing.assert_allclose(fitted.quantiles(x), (alone[0] + alone[1]) / 2, atol=1e-6)


def test_the_best_epoch_is_kept(known_law):
    """60 items are soon learnt by heart: what is kept is the epoch before that, as good as it was seen to be."""
    items, states, _ = known_law
    items, states, said = [*items[:60], *items[4000:5000]], np.concatenate([states[:60], states[4000:5000]]), []
    recipe = Recipe(width=64, members=1, epochs=60, lr=1e-2, dropout=0.0)
    head = fit_head(items, states, recipe, say=said.append)
    items, states = items[60:], states[60:]
    truth = np.array([item.price for item in items])
    found = torch.from_numpy(in_dollars(head.quantiles(states)))
    loss = float(pinball(found, torch.from_numpy(truth), torch.tensor(LEVELS)).mean())
    epoch = int(said[0].split("after ")[1].split()[0])
    assert 1 < epoch < 60 - recipe.patience and f"validation loss ${loss:.3f} after" in said[0]
    error = np.abs(head.median(states) - truth).mean()
    assert head.settings["val_mae_dollars"] == pytest.approx(error)


def test_other_items_than_those_of_train_and_val_change_nothing(known_law, fitted):
    items, states, _ = known_law
    items = items[:5000] + items_of([777.0] * 1000, ["test"] * 1000)
    states = np.concatenate([states[:5000], np.full((1000, 5), np.nan)])
    again = fit_head(items, states, SMALL, settings={"states": "tuned"})
    assert again.settings == fitted.settings
    assert same(again, fitted)


def test_validation_items_stop_it_but_teach_it_nothing(known_law):
    """Other validation prices may choose another epoch, never other weights within one epoch."""
    items, states, _ = known_law
    recipe = Recipe(width=8, members=1, epochs=1)
    other = items[:4000] + items_of([5.0] * 1000, ["val"] * 1000)
    one, two = (fit_head(chosen, states[:5000], recipe) for chosen in (items[:5000], other))
    assert same(one, two)


def test_saved_and_loaded_it_is_the_same_to_the_bit(fitted, known_law, tmp_path):
    path = save_head(fitted, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [FILE] == [path.name]
    loaded = load_head(tmp_path)
    assert loaded.settings == json.loads(json.dumps(fitted.settings)) and loaded.settings["train"] == 4000
    x = known_law[1][:200]
    assert np.array_equal(loaded.quantiles(x), fitted.quantiles(x))
    with safe_open(path, framework="pt") as file:
        assert {"mean", "spread", "price_mean", "price_spread"} <= set(file.keys())


def test_bad_input_is_one_clear_line(fitted, known_law, tmp_path):
    items, states, _ = known_law
    with pytest.raises(ValueError, match="has no head; train one with `python -m pricing.head --ckpt"):
        load_head(tmp_path)
    with pytest.raises(ValueError, match=r"reads 5 numbers an item, the states are \(3, 6\): another base model"):
        fitted.median(np.zeros((3, 6)))
    whole = save_head(fitted, tmp_path).read_bytes()
    for damaged in (whole[:-100], b"", whole.replace(b'"head"', b'"tail"')):
        (tmp_path / FILE).write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged or of another version") as error:
            load_head(tmp_path)
        assert "\n" not in str(error.value)
    few = [*items[:10], *items[4000:4002]], np.concatenate([states[:10], states[4000:4002]])
    fit_head(*few, replace(SMALL, epochs=10))  # ten steps, of which a tenth would be one
    with pytest.raises(ValueError, match="none of the 10 is in val"):
        fit_head(items[:10], states[:10], SMALL)
    with pytest.raises(ValueError, match="6000 items, but states of 7"):
        fit_head(items, states[:7], SMALL)
    with pytest.raises(ValueError, match="not finite"):
        fit_head(items, np.where(np.arange(6000)[:, None] == 3, np.inf, states), SMALL)


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
    head = joint_head(np.array([10.0, 80.0, 640.0]), width, 2.0, {}, "cpu")
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


def test_a_joint_head_has_the_numbers_that_memory_is_planned_for():
    assert sum(p.numel() for p in joint_head(np.ones(3), 72, 1.0, {}, "cpu").parameters()) == joint_numbers(72)


def test_a_forecast_reads_the_head_where_the_digits_begin(tiny):
    """The state that prefill leaves, prefix read once or not, against the states of the whole prompt"""
    model = our_model(tiny[1])
    prompts = [[7, 8, 9, *random.Random(n).choices(range(300), k=n + 2)] for n in range(6)]
    settings = {"states": "tuned", "blocks": [2], "mean": False}
    head = joint_head(np.array([5.0, 50.0, 500.0]), 72, 1.0, settings, "cpu")
    tree = PriceTree.build(lambda text: [ord(letter) for letter in text])
    seen = {}

    def on_batch(indices, part):
        seen.update(zip(indices, part.head, strict=True))

    found = forecast(model, tree, prompts, head, batch_tokens=20, on_batch=on_batch)
    expected = head.quantiles(head_states(model, prompts, settings, None))
    np.testing.assert_allclose(found.head, expected, atol=1e-4)
    np.testing.assert_array_equal([seen[n] for n in range(6)], found.head)
    np.testing.assert_allclose(found.median(), np.sqrt(found.median("head") * found.median("median")))
    assert np.ptp(found.head[:, MIDDLE]) > 1e-3
    other = joint_head(np.array([5.0, 50.0, 500.0]), 144, 1.0, settings | {"mean": True}, "cpu")
    again = forecast(model, tree, prompts, other)
    both = head_states(model, prompts, other.settings, None)
    np.testing.assert_allclose(again.head, other.quantiles(both), atol=1e-4)


# ---- states ----------------------------------------------------------------------------------------------------------


def prompts_of(*lengths: int) -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(300) for _ in range(length)] for length in lengths]


def test_states_are_transformers_hidden_states_at_the_last_prompt_token(tiny):
    hf, directory = tiny
    model, prompts = our_model(directory), prompts_of(9, 3, 14, 1, 6)
    with torch.no_grad():
        hidden = [hf(torch.tensor([p]), output_hidden_states=True).hidden_states for p in prompts]  # (1, T, C) each
    expected = np.stack([states[-1][0, -1].numpy() for states in hidden])
    found = last_states(model, prompts, 16)
    assert found.dtype == np.float32 and found.shape == (5, 72)
    np.testing.assert_allclose(found, expected, atol=2e-5)
    seen = []
    found = last_states(model, prompts, 16, [1, 2], True, seen.extend)
    rows = [torch.cat([states[b][0].select(0, -1) if last else states[b][0].mean(0)
                       for b in (1, 2) for last in (True, False)]) for states in hidden]  # fmt: skip
    np.testing.assert_allclose(found, torch.stack(rows).numpy(), atol=2e-5)
    assert sorted(seen) == list(range(5))
    np.testing.assert_allclose(last_states(model, prompts, None, [1]), found[:, :72], atol=2e-5)
    assert not any(layer._forward_hooks for layer in model.layers)
    for blocks in ([0], [3], []):
        with pytest.raises(ValueError, match="the model has the blocks 1 to 2"):
            last_states(model, prompts, 16, blocks)


def test_states_without_the_adapter_are_those_of_the_base(tiny):
    from lora.inject import inject, lora_layers

    prompts, base = prompts_of(5, 8), our_model(tiny[1])
    model = our_model(tiny[1])
    inject(model, rank=2, alpha=4, dropout=0.0, rslora=False, targets="all-linear")
    torch.manual_seed(0)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B)
    tuned, plain = last_states(model, prompts, 64), last_states(base, prompts, 64)
    assert np.abs(tuned - plain).max() > 0.1
    with without_adapter(model):
        np.testing.assert_allclose(last_states(model, prompts, 64), plain, atol=1e-6)
    np.testing.assert_array_equal(last_states(model, prompts, 64), tuned)
    both = head_states(model, prompts, {"states": "both", "blocks": [2], "mean": False}, 64)
    np.testing.assert_allclose(both, np.concatenate([tuned, plain], 1), atol=1e-6)


def test_states_are_kept_by_what_decides_them(tiny, tmp_path):
    model, prompts = our_model(tiny[1]), prompts_of(5, 8)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"one")
    about = {"options": {"bits": 16, "blocksize": 64, "double_quant": True}}
    settings = {"states": "tuned", "blocks": [2], "mean": False}

    def count() -> int:
        return len(list((tmp_path / "states").iterdir()))

    first = kept_states(tmp_path, about, model, prompts, settings, 64)
    model.embed_tokens.weight.data.add_(1)  # not part of the identity: what comes now is what was kept
    np.testing.assert_array_equal(kept_states(tmp_path, about, model, prompts, settings, 32), first)
    assert count() == 1
    kept_states(tmp_path, about, model, prompts[::-1], settings, 64)
    kept_states(tmp_path, about, model, prompts, settings | {"blocks": [1]}, 64)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"two")
    again = kept_states(tmp_path, about, model, prompts, settings, 64)
    assert count() == 4 and not np.array_equal(again, first)
    next(iter((tmp_path / "states").iterdir())).write_bytes(b"damaged")
    for _ in range(2):
        kept_states(tmp_path, about, model, prompts, settings, 64)


# ---- the commands ----------------------------------------------------------------------------------------------------

WORDS = {"tin": 8, "brass": 45, "silver": 260, "gold": 820}


@pytest.fixture
def trained(tiny_directory, tmp_path):
    """(checkpoint of one step, its data file)"""
    rng = random.Random(0)
    rows = []
    for n in range(200):
        word = rng.choice(list(WORDS))
        split = "train" if n < 140 else "val" if n < 170 else "test"
        price = round(WORDS[word] * rng.uniform(0.9, 1.1), 2)
        rows.append({"title": f"{word} {n}", "price": price, "description": " ".join([word] * 4), "split": split})
    data = tmp_path / "items.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--max-steps", "1", "--val-items", "9", "--max-tokens", "120", "--head", "none"]
    run("train.py", "--model", tiny_directory, "--data", data, "--out", tmp_path / "out", *options)
    return tmp_path / "out", data


def test_the_commands_and_a_poisoned_test_split(trained):
    out, data = trained
    fit = ["-m", "pricing.head", "--ckpt", out, "--width", "32", "--members", "2", "--epochs", "40", "--dropout", "0"]
    said, _ = run(*fit, "--lr", "5e-3")
    assert "states     tuned, after block 1, 2 and their means: 288 numbers for each of 170 items" in said
    first = (out / FILE).read_bytes()
    kept = load_file(out / FILE)

    run("evaluate.py", "--ckpt", out, "--decode", "head", "--quiet")
    metrics = json.loads((out / "report" / "metrics.json").read_text())
    assert metrics["decode"] == "head" and metrics["n"] == 30 and metrics["ratio"] < 0.35
    assert metrics["coverage"] > 0.5 and metrics["comparison"]["untuned model"]["ratio"] > 0.6
    run("evaluate.py", "--ckpt", out, "--decode", "blend", "--quiet", "--no-untuned", "--items", "9")
    mixed = json.loads((out / "report" / "metrics.json").read_text())
    assert mixed["decode"] == "blend" and mixed["n"] == 9 and mixed["ratio"] > metrics["ratio"]
    gold, _ = run("predict.py", "--ckpt", out, "--decode", "head", "gold 7\ngold gold gold gold")
    assert int(gold.split()[0].lstrip("$")) > 500

    rows = [json.loads(line) for line in data.read_text().splitlines()]
    for row in rows:
        if row["split"] == "test":
            row |= {"title": "poison", "description": "gold", "price": 1.0}
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    about = json.loads((out / "run.json").read_text())
    about["data"]["sha256"] = hashlib.sha256(data.read_bytes()).hexdigest()
    (out / "run.json").write_text(json.dumps(about))
    for path in (out / "states").iterdir():
        path.unlink()
    run(*fit, "--lr", "5e-3")
    assert (out / FILE).read_bytes() == first
    assert all(torch.equal(value, kept[name]) for name, value in load_file(out / FILE).items())

    with open(out / "adapter_model.safetensors", "ab") as adapter:
        adapter.write(b" ")
    with pytest.raises(ValueError, match="was trained on the states of another adapter; train it anew"):
        open_head(out)
