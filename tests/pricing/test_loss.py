"""The losses against their definitions by brute force, finite differences, and what each promises."""

import numpy as np
import pytest
import torch
from conftest import our_model
from test_decode import digits, pairs, whole
from torch.nn.functional import cross_entropy

from fast.graph import Step
from llama.attention import Layout
from lora.inject import inject, lora_layers
from lora.optim import FlatFactors, make_optimiser
from pipeline.options import training_options
from pricing.data.batch import pack, shape_of
from pricing.data.prompt import Example
from pricing.distribution.crps import CRPS_SCALES, crps_weights
from pricing.distribution.decode import PRICES, PriceTree, price_distribution
from pricing.distribution.loss import LOSSES, AnswerLoss
from pricing.evaluation.console import show_example


def example(price, encode=digits, prompt=(5, 6)):
    return Example(list(prompt), encode(f"{int(price + 0.5)}.00"), price)


def packed(examples, kind="answer", encode=digits, width=0.1, **crps):
    """(the loss as a function of logits alone, the batch)"""
    loss = AnswerLoss(kind, PriceTree.build(encode), width, "cpu", **crps)
    batch = pack(examples, shape_of(examples, 64))
    arrays = {name: torch.as_tensor(array) for name, array in loss.prepare(batch).items()}
    return lambda logits: loss(logits, arrays), batch


def test_answer_loss_is_plain_cross_entropy():
    loss, batch = packed([example(123.4), example(7)])
    logits = torch.randn(len(batch.targets), 300, generator=torch.Generator().manual_seed(0))
    real = int((batch.targets != -100).sum())
    expected = cross_entropy(logits[:real], torch.tensor(batch.targets[:real]), reduction="sum")
    torch.testing.assert_close(loss(logits), expected)


@pytest.mark.parametrize("encode", [digits, whole, pairs])
@pytest.mark.parametrize("price", [0.5, 7.0, 9.6, 98.0, 123.4, 999.2])
def test_soft_targets_equal_their_definition(encode, price):
    """q(token | path) by adding up q over the spellings that go on with it; the rest of the answer stays hard."""
    one, width = example(price, encode), 0.15
    loss, batch = packed([example(55.0, encode), one], "soft", encode, width)
    logits = torch.randn(len(batch.targets), 2100, generator=torch.Generator().manual_seed(1)).double()
    q = AnswerLoss("soft", PriceTree.build(encode), width, "cpu").soft_target([price])[0].double()
    spelt = [tuple(encode(str(n))) for n in range(PRICES)]
    begins = {s[:i] for s in spelt for i in range(len(s))}
    full = [s + tuple(encode(".")) if s in begins else s for s in spelt]
    expected, start = 0.0, (batch.targets != -100).sum() - len(one.answer)
    for step, token in enumerate(one.answer):
        log_probs = logits[start + step].log_softmax(0)
        path = tuple(one.answer[:step])
        below = [n for n in range(PRICES) if full[n][:step] == path and len(full[n]) > step]
        if below:
            for n in below:
                expected -= q[n] / q[below].sum() * log_probs[full[n][step]]
        else:
            expected -= log_probs[token]
    rest, _ = packed([example(55.0, encode)], "soft", encode, width)
    torch.testing.assert_close(loss(logits) - rest(logits[:start]), expected, rtol=1e-5, atol=1e-5)


def test_soft_neighbours_are_log_normal_around_the_price():
    q = AnswerLoss("soft", PriceTree.build(digits), 0.1, "cpu").soft_target([200.0, 3.0])
    torch.testing.assert_close(q.sum(1), torch.ones(2, dtype=torch.float64))
    values = torch.arange(PRICES).float()
    inside = (values > 200 * np.exp(-0.1)) & (values < 200 * np.exp(0.1))
    assert abs(q[0][inside].sum() - 0.6827) < 0.02  # one sigma
    assert q[0].argmax() in (197, 198, 199, 200) and q[1].argmax() == 3


def test_a_narrow_neighbourhood_is_the_hard_loss():
    examples = [example(98.0), example(123.0), example(640.0)]
    (soft, batch), (hard, _) = (packed(examples, kind, width=1e-5) for kind in ("soft", "answer"))
    logits = torch.randn(len(batch.targets), 300, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(soft(logits), hard(logits))


def test_soft_gradient_against_finite_differences():
    loss, batch = packed([example(98.0), example(310.0)], "soft")
    logits = torch.randn(len(batch.targets), 60, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    assert torch.autograd.gradcheck(loss, logits.requires_grad_())


# ---- price tokens only ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encode, counts", [(digits, [2, 3, 3, 1]), (whole, [1, 1, 1, 1]), (pairs, [1, 2, 2, 1])])
def test_price_loss_is_cross_entropy_on_the_tokens_that_choose_the_price(encode, counts):
    """7 needs its ".", as 12 does; 123 is complete, and so is 0: no price goes on from it."""
    examples = [example(price, encode) for price in (7, 12, 123, 0)]
    for kind in ("price", "crps"):
        loss = AnswerLoss(kind, PriceTree.build(encode), 0.1, "cpu")
        assert [loss.learnt(e) for e in examples] == counts
        assert loss.supervised(pack(examples, shape_of(examples, 64))) == sum(counts)
    loss, batch = packed(examples, "price", encode)
    logits = torch.randn(len(batch.targets), 2100, generator=torch.Generator().manual_seed(4))
    expected, start = 0.0, 0
    for e, count in zip(examples, counts, strict=True):
        expected += cross_entropy(logits[start : start + count], torch.tensor(e.answer[:count]), reduction="sum")
        start += len(e.answer)
    torch.testing.assert_close(loss(logits), expected)
    for kind in ("answer", "soft"):
        assert AnswerLoss(kind, PriceTree.build(encode), 0.1, "cpu").supervised(batch) == (batch.targets != -100).sum()


def test_the_first_example_shows_what_is_learnt(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")

    class Letters:
        def decode(self, ids):
            return "".join(map(chr, ids))

    one = Example(digits("$"), digits("12.00"), 12.0)
    shown = [show_example(one, Letters(), AnswerLoss(k, PriceTree.build(digits), 0.1, "cpu").learnt(one))
             for k in ("answer", "price")]  # fmt: skip
    assert shown == ["  | $[1][2][.][0][0]", "  | $[1][2][.]00"]


# ---- the CRPS ------------------------------------------------------------------------------------------------------


def place(d, scale):
    return float(d) if scale == "dollars" else float(np.log(max(d, 0.5)))


def brute_crps(distribution, observed, scale):
    """sum over d of (x(d + 1) - x(d)) (F(d) - G(d))^2 in plain Python floats; G jumps to 1 at an observed price"""
    f = g = score = 0.0
    for d in range(PRICES - 1):
        f, g = f + distribution[d], g + observed[d]
        score += (place(d + 1, scale) - place(d, scale)) * (f - g) ** 2
    return score


def point(price):
    return [float(d == price) for d in range(PRICES)]


def paths_of(encode):
    """Every price's tokens, with "." where it could go on, from the tokeniser alone"""
    spelt = [tuple(encode(str(n))) for n in range(PRICES)]
    begins = {s[:i] for s in spelt for i in range(len(s))}
    return [s + tuple(encode(".")) if s in begins else s for s in spelt]


def path_crps(logits, price, encode, scale):
    """The definition at the top of pricing/loss.py: at each step of the true path two whole distributions, the
    forecast's and the truth's, with each branch's mass shared evenly among its prices. logits (steps, V) float64"""
    full, total = paths_of(encode), 0.0
    for step, token in enumerate(full[price]):
        branches = {}
        for d in range(PRICES):
            if full[d][:step] == full[price][:step] and len(full[d]) > step:
                branches.setdefault(full[d][step], []).append(d)
        scores = {branch: float(logits[step, branch].exp()) for branch in branches}
        forecast, truth = [0.0] * PRICES, [0.0] * PRICES
        for branch, prices in branches.items():
            for d in prices:
                forecast[d] = scores[branch] / sum(scores.values()) / len(prices)
                truth[d] = (branch == token) / len(prices)
        total += brute_crps(forecast, truth, scale)
    return total


def crps_of(examples, encode, scale, vocabulary=2100):
    """(the path CRPS alone, as a function of logits, the batch): weight 1 less weight 0"""
    (one, batch), (none, _) = (
        packed(examples, "crps", encode, crps_weight=weight, crps_scale=scale) for weight in (1.0, 0.0)
    )
    return lambda logits: one(logits) - none(logits), batch


@pytest.mark.parametrize("scale", CRPS_SCALES)
@pytest.mark.parametrize("price", [0, 1, 42, 999])
def test_one_token_a_price_is_the_exact_crps_of_the_decoded_distribution(price, scale):
    """Through pricing.decode's distribution, in float64"""
    score, batch = crps_of([example(price, whole)], whole, scale)
    logits = 2 * torch.randn(len(batch.targets), 2100, generator=torch.Generator().manual_seed(5)).double()
    log_probs, tree = logits[:1].log_softmax(1), PriceTree.build(whole)
    distribution, _ = price_distribution(lambda p, c: (log_probs[:, c], None, None), None, [[1]], tree)
    expected = brute_crps(distribution[0], point(price), scale)
    np.testing.assert_allclose(float(score(logits)), expected, rtol=1e-10)


@pytest.mark.parametrize("scale", CRPS_SCALES)
@pytest.mark.parametrize("encode", [digits, pairs, whole])
def test_path_crps_equals_its_definition(encode, scale):
    prices = [0, 7, 12, 98, 123, 999]
    score, batch = crps_of([example(price, encode) for price in prices], encode, scale)
    logits = 2 * torch.randn(len(batch.targets), 2100, generator=torch.Generator().manual_seed(6)).double()
    expected, start = 0.0, 0
    for price in prices:
        expected += path_crps(logits[start:], price, encode, scale)
        start += len(encode(f"{price}.00"))
    np.testing.assert_allclose(float(score(logits)), expected, rtol=1e-10)


def test_a_forecast_of_one_sure_price_scores_its_absolute_error():
    for scale in CRPS_SCALES:
        score, batch = crps_of([example(42, whole)], whole, scale)
        for guess in (0, 41, 42, 43, 999):
            logits = torch.zeros(len(batch.targets), 2100, dtype=torch.float64)
            logits[0, 1000 + guess] = 1e3
            np.testing.assert_allclose(float(score(logits)), abs(place(guess, scale) - place(42, scale)), atol=1e-12)


@pytest.mark.parametrize("encode", [digits, pairs, whole])
def test_a_perfect_forecast_scores_nothing_and_a_nearer_one_less(encode):
    for scale in CRPS_SCALES:
        for price in (0, 7, 98, 640):
            one = example(price, encode)
            score, batch = crps_of([one], encode, scale)
            logits = torch.zeros(len(batch.targets), 2100, dtype=torch.float64)
            logits[torch.arange(len(one.answer)), torch.tensor(one.answer)] = 1e3
            assert float(score(logits)) == 0
        score, batch = crps_of([example(500, encode)], encode, scale)
        errors = []
        for guess in (500, 600, 900, 100):
            logits = torch.zeros(len(batch.targets), 2100, dtype=torch.float64)
            logits[torch.arange(len(encode("500.00"))), torch.tensor(encode("500.00"))] = 1e3
            logits[0, encode(str(guess))[0]] += 2e3
            errors.append(float(score(logits)))
        assert errors == sorted(errors) and errors[0] < errors[1]


@pytest.mark.parametrize("kind", ["price", "crps"])
@pytest.mark.parametrize("encode", [digits, pairs])
def test_gradients_against_finite_differences(kind, encode):
    for scale in CRPS_SCALES:
        loss, batch = packed(
            [example(98.0, encode), example(310.0, encode)], kind, encode, crps_weight=0.7, crps_scale=scale
        )
        logits = torch.randn(len(batch.targets), 200, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
        assert torch.autograd.gradcheck(loss, logits.requires_grad_())


def test_gradient_for_one_token_a_price_against_a_finite_difference():
    """Along random directions: 2,000 logits are too many to try one by one"""
    loss, batch = packed([example(98.0, whole)], "crps", whole)
    generator = torch.Generator().manual_seed(8)
    logits = torch.randn(len(batch.targets), 2000, generator=generator, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(logits), logits)
    for _ in range(5):
        way = torch.randn(logits.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            slope = (loss(logits + 1e-5 * way) - loss(logits - 1e-5 * way)) / 2e-5
        torch.testing.assert_close((gradient * way).sum(), slope, rtol=1e-6, atol=1e-8)


def opened_path_crps(table, price, full, numbers, truth_below):
    """CRPS of the whole distribution where only the true path is opened and other branches are spread evenly"""
    mass, pieces = torch.ones((), dtype=torch.float64), torch.zeros(PRICES, dtype=torch.float64)
    for step, token in enumerate(full[price]):
        prefix = full[price][:step]
        branches = sorted({p[step] for p in full if p[:step] == prefix and len(p) > step})
        chances = table[numbers[prefix], branches].softmax(0)
        for branch, chance in zip(branches, chances, strict=True):
            below = truth_below[(*prefix, branch)]
            if branch != token or len(full[price]) == step + 1:
                pieces = pieces + mass * chance * below / below.sum()
        mass = mass * chances[branches.index(token)]
    observed = torch.tensor(point(price), dtype=torch.float64)
    return ((pieces - observed).cumsum(0).square() * crps_weights("log")).sum()


def test_the_path_crps_is_proper_where_the_opened_path_is_not():
    """Prices drawn from a known distribution, logits at every node that give its true chances: the expected path CRPS
    must have no slope there. Spreading the branches off each price's own path, in one distribution, has one."""
    full, tree = paths_of(digits), PriceTree.build(digits)
    truth = torch.tensor(np.random.default_rng(0).dirichlet(np.full(PRICES, 0.3)))
    inner = sorted({path[:n] for path in full for n in range(len(path))})
    numbers, below = {prefix: i for i, prefix in enumerate(inner)}, {}
    for d, path in enumerate(full):
        for n in range(1, len(path) + 1):
            below.setdefault(path[:n], torch.zeros(PRICES, dtype=torch.float64))[d] = 1
    table = torch.zeros(len(inner), 60, dtype=torch.float64)
    for path, prices in below.items():
        table[numbers[path[:-1]], path[-1]] = (prices * truth).sum().log()
    table.requires_grad_()
    loss = AnswerLoss("crps", tree, 0.1, "cpu")
    expected = opened = 0.0
    for price in range(PRICES):
        steps = range(len(full[price]))
        rows = torch.tensor([loss.path_crps.row[tree.number[full[price][:s]]] for s in steps])
        taken = torch.tensor([tree.choices.index(full[price][s]) for s in steps])
        logits = table[[numbers[full[price][:s]] for s in steps]][:, tree.choices]
        expected = expected + truth[price] * loss.path_crps(logits, rows, taken)
        opened = opened + truth[price] * opened_path_crps(table, price, full, numbers, below)
    (slope,) = torch.autograd.grad(expected, table)
    assert slope.abs().max() < 1e-12
    (slope,) = torch.autograd.grad(opened, table)
    assert slope.abs().max() > 1e-3


def test_how_near_the_path_crps_of_digits_is_to_the_whole():
    """Log-normal forecasts that are right about their own width, prices spelt in digits: in ln price the path CRPS has
    about the size of the CRPS of the whole distribution and goes up and down with it; in dollars much less so."""
    rng, tree, full = np.random.default_rng(0), PriceTree.build(digits), paths_of(digits)
    below, d = tree.below(), np.arange(PRICES)
    x = np.log(np.maximum(d, 0.5))
    found = {}
    for scale in CRPS_SCALES:
        crps = AnswerLoss("crps", tree, 0.1, "cpu", crps_scale=scale).path_crps
        scores = []
        for _ in range(400):
            price, width = int(np.clip(np.exp(rng.normal(4.6, 1.2)), 1, 999)), rng.uniform(0.2, 0.9)
            centre = np.log(price) + width * rng.normal()
            forecast = np.exp(-0.5 * ((x - centre) / width) ** 2 - x) + 1e-9
            forecast /= forecast.sum()
            chance = below @ torch.tensor(forecast)  # of each node
            nodes = [tree.number[full[price][:s]] for s in range(len(full[price]))]
            logits = torch.full((len(nodes), len(tree.choices)), -1e9, dtype=torch.float64)
            for child in range(1, len(tree.parent)):
                if tree.parent[child] in nodes:
                    logits[nodes.index(tree.parent[child]), tree.choice[child]] = chance[child].log()
            rows = torch.tensor([crps.row[node] for node in nodes])
            taken = torch.tensor([tree.choices.index(token) for token in full[price]])
            scores.append([brute_crps(forecast, point(price), scale), float(crps(logits, rows, taken))])
        whole_score, path_score = np.array(scores).T
        found[scale] = np.corrcoef(whole_score, path_score)[0, 1], path_score.mean() / whole_score.mean()
    assert found["log"][0] > 0.7 and 0.8 < found["log"][1] < 1.5, found
    assert found["dollars"][0] > 0.2, found


# ---- what holds for all --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LOSSES)
def test_batches_add_up_filler_is_nothing_and_sizes_are_fixed(kind):
    """An item's loss is the same alone and among others, so the weight of its parts is the same in any batch."""
    examples = [example(98.0), example(7.0), example(640.0)]
    shape = shape_of(examples, 64)
    loss = AnswerLoss(kind, PriceTree.build(digits), 0.1, "cpu", crps_weight=3.0)
    logits = torch.randn(shape.answers, 60, generator=torch.Generator().manual_seed(9), dtype=torch.float64)

    def value(chosen, start):
        prepared = loss.prepare(pack(chosen, shape))
        assert {k: v.shape[0] for k, v in prepared.items()} == dict.fromkeys(prepared, shape.answers)
        return loss(logits.roll(-start, 0), {k: torch.as_tensor(v) for k, v in prepared.items()})

    starts = np.cumsum([0] + [len(e.answer) for e in examples])
    parts = [value([e], start) for e, start in zip(examples, starts, strict=False)]
    torch.testing.assert_close(value(examples, 0), sum(parts))
    assert value([], 0) == 0
    kinds = [{k: v.dtype for k, v in loss.prepare(pack(chosen, shape)).items()} for chosen in ([], examples)]
    assert kinds[0] == kinds[1]


@pytest.mark.parametrize("kind", LOSSES)
def test_a_few_steps_lower_the_loss(tiny, kind):
    model = our_model(tiny[1], bits=16)
    torch.manual_seed(0)
    inject(model, rank=4, alpha=8)
    factors = FlatFactors(lora_layers(model))
    examples = [example(price, prompt=(5, 6, number)) for number, price in enumerate((7, 98, 123, 640))]
    shape = shape_of(examples, 64)
    loss = AnswerLoss(kind, PriceTree.build(digits), 0.1, "cpu", crps_weight=2.0)
    step = Step(
        model, loss, factors, make_optimiser("adamw", factors.parameter, 2e-2, 0.0), [], shape,
        accumulate=1, clip=1.0, graph=False,
    )  # fmt: skip
    losses = [step([pack(examples, shape)], 2e-2).read()[0] for _ in range(12)]
    assert losses[-1] < 0.7 * losses[0]


def test_a_step_divides_by_the_tokens_that_carry_loss(tiny):
    """The first loss that a step reports, for two batches of unlike answers, is sum over sum"""
    examples = [example(7), example(123), example(640)]
    shape, model = shape_of(examples, 64), our_model(tiny[1], bits=16)
    inject(model, rank=4, alpha=8)
    factors = FlatFactors(lora_layers(model))
    loss = AnswerLoss("price", PriceTree.build(digits), 0.1, "cpu")
    step = Step(
        model, loss, factors, make_optimiser("adamw", factors.parameter, 1e-3, 0.0), [], shape,
        accumulate=2, clip=1.0, graph=False,
    )  # fmt: skip
    window = [pack(examples[:1], shape), pack(examples[1:], shape)]
    value = step(window, 0.0).read()[0]
    nats = 0.0
    for e, count in zip(examples, (2, 3, 3), strict=True):
        ids = torch.tensor(e.prompt + e.answer)
        at = torch.arange(len(e.prompt) - 1, len(e.prompt) - 1 + count)
        with torch.no_grad():
            logits = model(ids, Layout.packed([len(ids)]), at)
        nats += float(cross_entropy(logits, ids[at + 1], reduction="sum"))
    np.testing.assert_allclose(value, nats / 8, rtol=1e-4)


def test_senseless_choices_are_refused(capsys):
    with pytest.raises(ValueError, match="unknown loss"):
        AnswerLoss("best", PriceTree.build(digits), 0.1, "cpu")
    with pytest.raises(ValueError, match="unknown scale"):
        crps_weights("euros")
    assert training_options(["--loss", "crps", "--crps-weight", "3", "--crps-scale", "dollars"]).crps_weight == 3
    for words in (["--crps-weight", "0"], ["--crps-weight", "nan"], ["--crps-scale", "euros"], ["--loss", "best"]):
        with pytest.raises(SystemExit):
            training_options(words)
        assert words[0] in capsys.readouterr().err
