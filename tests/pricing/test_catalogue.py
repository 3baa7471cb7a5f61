"""The built-in catalogue: the same everywhere, priced as documented, readable from its text, with a known floor.

    python -m pytest tests/pricing/test_catalogue.py
"""
import hashlib
import json
import math
import random
import re
from dataclasses import fields
from statistics import fmean, pstdev

import pytest

from pricing.data import catalogue
from pricing.data.catalogue import BRANDS, CATEGORIES, COUNTS, SIGMA, Factors, generate, least_error


@pytest.fixture(scope="module")
def items():
    return generate(5000)


def drawn(i, seed=0):
    """The factors behind item i."""
    return catalogue._draw(random.Random(f"{seed}:{i}"))


def named_in(text, wordings):
    """Those of the wordings that stand in the text as whole words."""
    return [w for w in wordings if re.search(rf"(?<!\w){re.escape(w)}(?!\w)", text, re.IGNORECASE)]


def read(item):
    """The factors as a reader of the text and the tables finds them. Each one-element unpacking is a claim."""
    text = f"{item['title']}\n{item['description']}"
    category = CATEGORIES[item["category"]]
    (brand,) = named_in(text, BRANDS)
    (noun,) = named_in(item["title"], category.nouns)
    (material,) = named_in(text, category.materials)
    sizes = re.findall(rf"(?<![\d.])(\d+(?:\.\d+)?)[ -]?(?:{'|'.join(category.unit)})\b", text, re.IGNORECASE)
    (size,) = {float(size) for size in sizes}
    packs = re.findall(r"\b(?:pack|set|box|bundle) of (\w+)|\b(\d+)-pack\b", text, re.IGNORECASE)
    (count,) = {a or b for a, b in packs} or {"1"}
    count = {word: n for n, word in COUNTS.items()}.get(count.lower()) or int(count)
    features = frozenset(wordings for wordings in category.features if named_in(text, wordings))
    return Factors(item["category"], brand, noun, size, material, features, count)


def test_the_first_200_items_are_the_same_on_every_machine():
    digest = hashlib.sha256(json.dumps(generate(200, seed=0)).encode()).hexdigest()
    assert digest == "13e3cbce3159ecf3b95c47c6d336ddbe4603f6cee723d30647e978409d66e3fe"


def test_an_item_does_not_depend_on_how_many_are_asked_for(items):
    assert generate(100)[:50] == generate(50) == items[:50]


def test_seeds_differ(items):
    other = generate(200, seed=1)
    assert sum(a["title"] == b["title"] for a, b in zip(items, other)) <= 2
    assert all(a["price"] != b["price"] for a, b in zip(items[:20], other))


@pytest.mark.parametrize("n", [0, -3])
def test_a_bad_n_is_refused_in_one_line(n):
    with pytest.raises(ValueError, match=rf"^n, the number of items, must be at least 1, not {n}$"):
        generate(n)


def test_keys_and_types(items):
    for item in items[:500]:
        assert list(item) == ["title", "category", "brand", "description", "price", "fair_price"]
        assert all(isinstance(item[key], str) and item[key].strip() for key in list(item)[:4])
        assert not re.search(r"[{}]|  |^\W|[,;|/-]$", item["title"])
        assert item["category"] in CATEGORIES and item["brand"] in BRANDS


def test_prices_are_cents_in_range(items):
    for item in items:
        assert 0.50 <= item["price"] <= 999.49 and item["price"] == round(item["price"], 2)
        assert 3 <= item["fair_price"] <= 600


def test_noise_is_drawn_again_when_the_price_leaves_the_range():
    rng = random.Random(0)
    assert all(catalogue._noisy(rng, 990.0) <= 999.49 for _ in range(500))
    assert all(catalogue._noisy(rng, 0.51) >= 0.50 for _ in range(500))


def test_noise_is_log_normal(items):
    logs = [math.log(item["price"] / item["fair_price"]) for item in items]
    n = len(logs)                                                   # 4 standard errors each
    assert abs(fmean(logs)) < 4 * SIGMA / math.sqrt(n)
    assert abs(pstdev(logs) - SIGMA) < 4 * SIGMA / math.sqrt(2 * n)
    within = fmean(abs(x) < SIGMA for x in logs)                    # 68.27 % of a normal
    assert abs(within - math.erf(1 / math.sqrt(2))) < 4 * math.sqrt(0.68 * 0.32 / n)


@pytest.mark.parametrize("sigma", [0.05, SIGMA, 0.6])
def test_least_error_is_the_integral(sigma):
    step = 1e-3
    grid = [-8 + step * k for k in range(16001)]
    integral = step * sum(abs(math.exp(sigma * z) - 1) * math.exp(-z * z / 2) for z in grid) / math.sqrt(2 * math.pi)
    assert least_error(80.0, sigma) == pytest.approx(80 * integral, rel=1e-5)
    assert least_error(80.0) == least_error(80.0, SIGMA)


def test_the_oracle_reaches_the_floor_and_no_scaled_guess_beats_it(items):
    def mae(scale):
        return fmean(abs(item["price"] - scale * item["fair_price"]) for item in items)
    assert mae(1) == pytest.approx(fmean(least_error(item["fair_price"]) for item in items), rel=0.05)
    assert mae(1) < mae(0.95) and mae(1) < mae(1.05)


@pytest.mark.parametrize("factor", [field.name for field in fields(Factors)])
def test_the_text_names_every_factor(items, factor):
    for i, item in enumerate(items[:500]):
        truth = getattr(drawn(i), factor)
        truth = frozenset(truth) if factor == "features" else truth
        assert getattr(read(item), factor) == truth, item


def test_the_fair_price_follows_from_the_text(items):
    """The formula of the module's docstring, written out again on the factors read from the text."""
    for item in items[:500]:
        seen = read(item)
        category = CATEGORIES[seen.category]
        base, sizes = category.nouns[seen.noun]
        price = (base * (seen.size / sizes[0]) ** category.power * category.materials[seen.material]
                 * BRANDS[seen.brand][0] * math.prod(category.features[f] for f in seen.features) * seen.count ** 0.85)
        assert item["fair_price"] == pytest.approx(price, abs=1e-4)


def test_the_worked_example_is_the_item_it_says(items):
    prose = " ".join(catalogue.__doc__.split())
    number, seed = re.search(r"Item (\d+) of seed (\d+)", prose).groups()
    item = generate(int(number) + 1, int(seed))[-1]
    price, fair_price = f"= {item['price']:.2f} price", f"= {item['fair_price']:.2f} fair_price"
    for told in (item["title"], item["description"], fair_price, price):
        assert told in prose


def test_the_tables_are_broad():
    assert len(CATEGORIES) >= 12 and 20 <= len(BRANDS) <= 25
    for category in CATEGORIES.values():
        sellers = [brand for brand, (_, sells) in BRANDS.items() if category.department in sells.split()]
        assert len(sellers) >= 8 and len(category.nouns) >= 4
        assert all(n in COUNTS for n in category.packs)
    assert min(m for m, _ in BRANDS.values()) < 0.85 and max(m for m, _ in BRANDS.values()) > 1.4


def test_categories_and_prices_are_spread_out(items):
    prices = sorted(item["price"] for item in items)
    median = prices[len(prices) // 2]
    assert 90 < fmean(prices) < 130
    assert 60 < fmean(abs(price - median) for price in prices) < 100
    levels = {name: fmean(item["price"] for item in items if item["category"] == name) for name in CATEGORIES}
    assert max(levels.values()) > 5 * min(levels.values())


def test_titles_are_distinct_and_texts_short(items):
    titles = {" ".join(item["title"].lower().split()) for item in items[:3000]}
    assert len(titles) >= 0.95 * 3000
    words = sorted(len(f"{item['title']} {item['description']}".split()) for item in items)
    assert words[len(words) // 2] < 30 and words[int(0.95 * len(words))] < 43      # about 1.4 tokens a word


def test_the_command_prints_json_lines(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["catalogue", "3", "--seed", "7"])
    catalogue.main()
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == generate(3, seed=7)


def test_the_command_refuses_a_bad_n(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["catalogue", "0"])
    with pytest.raises(SystemExit):
        catalogue.main()
    assert "must be at least 1, not 0" in capsys.readouterr().err
