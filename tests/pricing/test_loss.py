"""The losses against their definitions by brute force, finite differences, and what each promises."""

import numpy as np
import pytest
import torch
from conftest import our_model, step_of
from test_decode import digits, pairs, whole
from torch.nn.functional import cross_entropy

from llama.attention import Layout
from lora.inject import inject, lora_layers
from lora.optim import FlatParameter, make_optimiser
from pipeline.options import training_options
from pricing.data.batch import pack, shape_of
from pricing.data.prompt import Example
from pricing.distribution.decode import PRICES, PriceTree
from pricing.distribution.loss import LOSSES, AnswerLoss
from pricing.evaluation.console import show_example


def example(price, encode=digits, prompt=(5, 6)):
    return Example(list(prompt), encode(f"{int(price + 0.5)}.00"), price)


def packed(examples, kind="answer", encode=digits, width=0.1):
    """(the loss as a function of logits alone, the batch)"""
    loss = AnswerLoss(kind, PriceTree.build(encode), width, "cpu")
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
    loss = AnswerLoss("price", PriceTree.build(encode), 0.1, "cpu")
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


@pytest.mark.parametrize("encode", [digits, pairs])
def test_gradients_of_the_price_loss_against_finite_differences(encode):
    loss, batch = packed([example(98.0, encode), example(310.0, encode)], "price", encode)
    logits = torch.randn(len(batch.targets), 200, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    assert torch.autograd.gradcheck(loss, logits.requires_grad_())


def test_the_first_example_shows_what_is_learnt(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")

    class Letters:
        def decode(self, ids):
            return "".join(map(chr, ids))

    one = Example(digits("$"), digits("12.00"), 12.0)
    shown = [show_example(one, Letters(), AnswerLoss(k, PriceTree.build(digits), 0.1, "cpu").learnt(one))
             for k in ("answer", "price")]  # fmt: skip
    assert shown == ["  | $[1][2][.][0][0]", "  | $[1][2][.]00"]


# ---- what holds for all --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LOSSES)
def test_batches_add_up_filler_is_nothing_and_sizes_are_fixed(kind):
    """An item's loss is the same alone and among others, so the weight of its parts is the same in any batch."""
    examples = [example(98.0), example(7.0), example(640.0)]
    shape = shape_of(examples, 64)
    loss = AnswerLoss(kind, PriceTree.build(digits), 0.1, "cpu")
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
    factors = FlatParameter(lora_layers(model))
    examples = [example(price, prompt=(5, 6, number)) for number, price in enumerate((7, 98, 123, 640))]
    shape = shape_of(examples, 64)
    loss = AnswerLoss(kind, PriceTree.build(digits), 0.1, "cpu")
    step = step_of(model, loss, factors, make_optimiser("adamw", factors.parameter, 2e-2, 0.0), shape)
    losses = [step([pack(examples, shape)], 2e-2)()[0] for _ in range(12)]
    assert losses[-1] < 0.7 * losses[0]


def test_a_step_divides_by_the_tokens_that_carry_loss(tiny):
    """The first loss that a step reports, for two batches of unlike answers, is sum over sum"""
    examples = [example(7), example(123), example(640)]
    shape, model = shape_of(examples, 64), our_model(tiny[1], bits=16)
    inject(model, rank=4, alpha=8)
    factors = FlatParameter(lora_layers(model))
    loss = AnswerLoss("price", PriceTree.build(digits), 0.1, "cpu")
    step = step_of(model, loss, factors, make_optimiser("adamw", factors.parameter, 1e-3, 0.0), shape, accumulate=2)
    window = [pack(examples[:1], shape), pack(examples[1:], shape)]
    value = step(window, 0.0)()[0]
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
    for words in (["--loss", "best"], ["--loss", "crps"], ["--crps-weight", "2"]):
        with pytest.raises(SystemExit):
            training_options("", words)
        assert words[0] in capsys.readouterr().err
