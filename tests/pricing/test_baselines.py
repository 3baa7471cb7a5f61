"""Baselines learn what is there to learn, from training items only, and are computed once."""

import json

import numpy as np
import pytest
import torch

from pricing.data.items import Item
from pricing.evaluation import baselines
from pricing.evaluation.baselines import BASELINES, CHEAP, run_baselines, simple_features

TEXTS = ("gold ring", "tin ring", "gold box", "tin box")


def item(number: int, text: str, price: float, split: str, category: str = "") -> Item:
    return Item(str(number), text, text, price, category, split)


@pytest.fixture
def rings():
    """Gold costs fifty times as much as tin; the rest of the text says nothing."""
    rng = np.random.default_rng(0)
    train = [
        item(n, f"{TEXTS[n % 4]} {n % 7}", (500.0 if n % 2 == 0 else 10.0) * rng.uniform(0.95, 1.05), "train")
        for n in range(200)
    ]
    return train, [item(n, f"{TEXTS[n]} 3", 500.0 if n % 2 == 0 else 10.0, "test") for n in range(4)]


def test_constants_by_hand():
    train = [item(n, "a", price, "train") for n, price in enumerate((1.0, 2.0, 30.0))]
    assert BASELINES["constant: mean"](train, train[:2]).tolist() == [11, 11]
    assert BASELINES["constant: median"](train, train[:2]).tolist() == [2, 2]


@pytest.mark.parametrize("name", ["ridge on tf-idf", "random forest", "gradient boosting", "residual network"])
def test_what_reads_words_finds_the_one_that_counts(rings, name):
    np.testing.assert_allclose(BASELINES[name](*rings), [500, 10, 500, 10], rtol=0.25)


def test_simple_features_by_hand():
    features = simple_features([item(1, "usb 3.1 cable 2 m 15 w", 1, "test", "cable")], ["box", "cable"])
    numbers = np.log1p([2, 3.1, 15])
    np.testing.assert_allclose(features, [[22, 7, 3, numbers[0], numbers.mean(), numbers[2], 0, 1]])
    assert simple_features([item(1, "cable", 1, "test")], []).tolist() == [[5, 1, 0, 0, 0, 0]]


def test_guesses_stay_among_the_prices_there_are():
    """Watts from 1 to 9 at $2 each, in logs; then a million."""
    items = [item(n, f"{n} w", 2.0 * n, "train") for n in range(1, 10)]
    guess = BASELINES["linear on simple features"](items, [item(0, "1000000 w", 1, "test")])
    assert guess.tolist() in ([0.5], [999.49])


def test_linear_learns_numbers_and_categories():
    """price = 2 (1 + watts), four times that for pumps: linear in what it sees, in logs"""
    watts = np.random.default_rng(0).integers(10, 100, 300)
    items = [item(n, f"{w} w", 2.0 * (1 + w) * (4 if n % 3 == 0 else 1), "train", "pump" if n % 3 == 0 else "fan")
             for n, w in enumerate(watts)]  # fmt: skip
    guess = BASELINES["linear on simple features"](items[:250], items[250:])
    np.testing.assert_allclose(guess, [i.price for i in items[250:]], rtol=1e-6)
    unknown = BASELINES["linear on simple features"](items, [item(1, "20 w", 1, "test", "kettle")])
    assert 0.5 <= unknown[0] <= 999.49


@pytest.mark.parametrize("name", BASELINES)
def test_one_training_item_is_enough_to_say_something(rings, name):
    guess = BASELINES[name](rings[0][:1], rings[1])
    assert guess.shape == (4,) and ((guess >= 0.5) & (guess <= 999.49)).all()


@pytest.mark.parametrize("name", BASELINES)
def test_seeded_blind_to_test_prices_and_careful_with_the_random_numbers(rings, name):
    train, test = rings
    state = torch.manual_seed(5).get_state()
    first = BASELINES[name](train[:60], test)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    again = BASELINES[name](train[:60], [item(n, t.text, 123.0, "test") for n, t in enumerate(test)])
    np.testing.assert_allclose(again, first, rtol=1e-4)


def test_computed_once_for_the_same_items(rings, tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path))
    train, test = rings
    calls = []
    monkeypatch.setattr(
        baselines, "BASELINES", {name: lambda a, b, name=name, **_: calls.append(name) or np.full(len(b), 7.123)
                                 for name in BASELINES}
    )  # fmt: skip
    quick = run_baselines(train, test, every=False)
    assert calls == list(quick) == list(CHEAP)
    result = run_baselines(train, test, every=True)
    assert sorted(calls) == sorted(BASELINES) and list(result) == list(BASELINES)  # the quick ones not again
    assert result["random forest"]["guess"].tolist() == [7.12] * 4 and result["random forest"]["seconds"] >= 0
    run_baselines(train, [item(9, t.text, 1.0, "test") for t in test], every=True)  # other test prices: no matter
    assert len(calls) == len(BASELINES)
    cheaper = [item(0, train[0].text, 1.0, "train"), *train[1:]]
    for other in ((cheaper, test), (train[1:], test), (train, test[:2])):
        run_baselines(*other, every=False)
    assert len(calls) == len(BASELINES) + 3 * len(CHEAP)
    for path in (tmp_path / "baselines").iterdir():  # a damaged file is computed again
        path.write_text(json.dumps({"random forest": 1})[:-3])
    assert list(run_baselines(train, test, every=True)) == list(BASELINES)
    assert len(calls) == 2 * len(BASELINES) + 3 * len(CHEAP)
