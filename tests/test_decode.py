"""The distribution over whole dollars against brute force, on tokenisers of every kind and a tiny model."""

import re

import numpy as np
import pytest
import torch
from conftest import our_model
from torch.nn.functional import cross_entropy

from llama.attention import Layout
from pricing.batch import pack, shape_of
from pricing.decode import PRICES, PriceTree, greedy_prices, pick, price_distribution, quantile
from pricing.loss import AnswerLoss
from pricing.prompt import Example

PROMPTS = [[20, 21, 22, 23, 24], [30, 31], list(range(40, 61))]


def digits(text):  # SmolLM2, Qwen, Gemma, Llama 2
    return [ord(c) for c in text]


def whole(text):  # Llama 3: up to three digits are one token
    return [1000 + int(part) if part.isdigit() else ord(part) for part in re.findall(r"\d{1,3}|\D", text)]


def pairs(text):  # GPT-2 like: two digits merge where they can
    out = []
    while text:
        n = 2 if text[:2].isdigit() and len(text) > 1 else 1
        out.append(100 + int(text[:2]) if n == 2 else ord(text[0]))
        text = text[n:]
    return out


def random_model(vocabulary=2100, width=24, seed=0, sharpness=0.7, digit_bias=0.0):
    """A fixed random function from token ids to log-probabilities, with the interface of Llama.prefill and
    Llama.extend."""
    weight = torch.randn(vocabulary, width, generator=torch.Generator().manual_seed(seed))
    head = torch.randn(vocabulary, width, generator=torch.Generator().manual_seed(seed + 1)) * sharpness

    bias = torch.zeros(vocabulary)
    bias[46:58] = digit_bias  # ".", "/" and the digits

    def log_probs(ids):
        state = sum((torch.roll(weight[t], i) for i, t in enumerate(ids)), torch.zeros(width)).tanh()
        return (head @ state + bias).log_softmax(0)

    def prefill(prompts, choices):
        out = torch.stack([log_probs(p) for p in prompts])
        return out[:, choices], out.argmax(1), [[p] for p in prompts]

    def extend(cache, tokens, parents, choices):
        rows = []
        for row in range(len(cache)):
            new = [
                cache[row][parent] + [token]
                for token, parent in zip(tokens[row].tolist(), parents[row].tolist(), strict=True)
            ]
            cache[row] += new
            rows.append(torch.stack([log_probs(ids) for ids in new]))
        out = torch.stack(rows)
        return out[:, :, choices], out.argmax(2)

    return log_probs, prefill, extend


def brute_force(log_probs, prompt, encode):
    """Score every one of the 1,000 answers by itself: its tokens, and "." where it could go on as another price."""
    spelt = [tuple(encode(str(n))) for n in range(PRICES)]
    begins = {s[:i] for s in spelt for i in range(len(s))}
    scores = []
    for path in spelt:
        ids, total = list(prompt), 0.0
        for token in [*path, *(encode(".") if path in begins else [])]:
            total += log_probs(ids)[token].double().item()
            ids.append(token)
        scores.append(np.exp(total))
    return np.array(scores) / sum(scores)


@pytest.mark.parametrize("encode", [digits, whole, pairs])
def test_equals_brute_force_and_sums_to_one(encode):
    log_probs, prefill, extend = random_model()
    got, named = price_distribution(prefill, extend, PROMPTS, PriceTree.build(encode))
    np.testing.assert_allclose(got.sum(1), 1, rtol=1e-12)
    assert ((named > 0) & (named < 1)).all()
    for row, prompt in enumerate(PROMPTS):
        np.testing.assert_allclose(got[row], brute_force(log_probs, prompt, encode), rtol=1e-4, atol=1e-9)


def test_equals_brute_force_through_the_real_network(tiny):
    """Every answer by a full forward of its own, no cache, against the digit tree with its cache, in float32."""
    model = our_model(tiny[1])
    tree = PriceTree.build(digits)
    got, _ = price_distribution(model.prefill, model.extend, PROMPTS, tree)

    def log_probs(ids):
        key = tuple(ids)
        if key not in seen:
            seen[key] = model(torch.tensor(ids), Layout.packed([len(ids)]), torch.tensor([len(ids) - 1]))[
                0
            ].log_softmax(0)
        return seen[key]

    for row, prompt in enumerate(PROMPTS):
        seen = {}
        with torch.no_grad():
            np.testing.assert_allclose(got[row], brute_force(log_probs, prompt, digits), rtol=1e-3, atol=1e-8)


def test_shape_of_the_trees():
    assert [len(level) for level in PriceTree.build(digits).levels] == [1, 9, 90]
    assert [len(level) for level in PriceTree.build(whole).levels] == [1]


def test_neither_the_batch_nor_its_order_changes_a_distribution(tiny):
    model, tree = our_model(tiny[1]), PriceTree.build(digits)
    for prune in (0.0, 2e-3):
        together, _ = price_distribution(model.prefill, model.extend, PROMPTS, tree, prune)
        reverse, _ = price_distribution(model.prefill, model.extend, PROMPTS[::-1], tree, prune)
        np.testing.assert_allclose(together, reverse[::-1], rtol=1e-3, atol=1e-9)
        for row, prompt in enumerate(PROMPTS):
            alone, _ = price_distribution(model.prefill, model.extend, [prompt], tree, prune)
            np.testing.assert_allclose(together[row], alone[0], rtol=1e-3, atol=1e-9)


def test_pruning_opens_less_loses_nothing_and_moves_only_what_was_shut():
    log_probs, prefill, extend = random_model(sharpness=0.3, digit_bias=9.0)
    tree = PriceTree.build(digits)
    exact, full = price_distribution(prefill, extend, PROMPTS, tree)
    opened = []

    def counting(cache, tokens, parents, choices):
        opened.append(tokens.shape[1])
        return extend(cache, tokens, parents, choices)

    prune = 2e-3
    pruned, cut = price_distribution(prefill, counting, PROMPTS, tree, prune)
    assert sum(opened) < 99  # it did prune
    np.testing.assert_allclose(pruned.sum(1), 1, rtol=1e-12)
    certain = (
        exact * full[:, None] > prune
    )  # such a price lies below nodes that were all opened: only the sum it is divided by moves
    assert certain.sum() >= 20
    np.testing.assert_allclose((pruned * cut[:, None])[certain], (exact * full[:, None])[certain], rtol=1e-6)


def test_greedy_is_what_generation_writes():
    log_probs, prefill, extend = random_model()
    for encode in (digits, whole, pairs):
        tree = PriceTree.build(encode)
        letters = {tuple(encode(str(n))): n for n in range(PRICES)}
        for seed in range(12):
            log_probs, prefill, extend = random_model(vocabulary=2100 if encode is whole else 400, seed=seed)
            got = greedy_prices(prefill, extend, PROMPTS, tree)
            for row, prompt in enumerate(PROMPTS):
                path = ()
                while len(path) < 3 and any(k[: len(path)] == path and len(k) > len(path) for k in letters):
                    token = int(log_probs([*prompt, *path]).argmax())
                    if not any(k[: len(path) + 1] == (*path, token) for k in letters):
                        break
                    path += (token,)
                expected = letters.get(path, np.nan)
                np.testing.assert_equal(got[row], expected)


def test_greedy_reads_a_price_and_reports_none():
    tree = PriceTree.build(digits)

    def scripted(text):
        def step(ids_so_far):
            return ord(text[ids_so_far]) if ids_so_far < len(text) else 0

        def prefill(prompts, choices):
            return None, torch.tensor([step(0)] * len(prompts)), [0]

        def extend(cache, tokens, parents, choices):
            cache[0] += 1
            return None, torch.full(tokens.shape, step(cache[0]))

        return greedy_prices(prefill, extend, [[1]], tree)[0]

    assert [scripted(t) for t in ("123.00", "45.00", "7.00", "12 dollars")] == [123, 45, 7, 12]
    assert np.isnan(scripted("about 5"))


def test_picks_and_quantiles_by_hand():
    p = np.zeros((2, PRICES))
    p[0, [10, 20, 90]] = [0.5, 0.2, 0.3]
    p[1, 999] = 1
    assert pick(p, "median").tolist() == [10, 999]
    assert pick(p, "mode").tolist() == [10, 999]
    np.testing.assert_allclose(pick(p, "mean"), [0.5 * 10 + 0.2 * 20 + 0.3 * 90, 999])
    assert quantile(p, 0.6).tolist() == [20, 999]
    assert quantile(p, 0.9).tolist() == [90, 999]
    with pytest.raises(ValueError, match="unknown decoding"):
        pick(p, "best")


def test_the_median_has_the_least_expected_absolute_error():
    p = np.random.default_rng(0).dirichlet(np.full(PRICES, 0.01), size=1)
    expected = [(p[0] * np.abs(np.arange(PRICES) - guess)).sum() for guess in range(PRICES)]
    assert int(pick(p, "median")[0]) == int(np.argmin(expected))


def test_an_answer_that_leaves_the_tree_is_refused():
    """A tokeniser with ".00" in one piece: training would teach a token that scoring never asks about."""

    def one_piece(text):
        return [ord(c) for c in text.removesuffix(".00")] + [299] * text.endswith(".00")

    with pytest.raises(ValueError, match='unlike "0" and "."|unlike "1" and "."'):
        PriceTree.build(one_piece)


def test_senseless_spelling_and_broken_models_are_refused():
    with pytest.raises(ValueError, match="does not spell"):
        PriceTree.build(lambda text: [7])
    nan = torch.full((1, 11), float("nan"))
    with pytest.raises(ValueError, match="no finite probability"):
        price_distribution(lambda p, c: (nan, None, None), None, [[1]], PriceTree.build(digits), prune=0.1)


# ---- the losses ----------------------------------------------------------------------------------------------------


def example(price, encode=digits, prompt=(5, 6)):
    return Example(list(prompt), encode(f"{int(price + 0.5)}.00"), price)


def packed(examples, kind="answer", encode=digits, width=0.1):
    """(the loss as a function of logits alone, the batch)"""
    loss, batch = AnswerLoss(kind, PriceTree.build(encode), width, "cpu"), pack(examples, shape_of(examples, 64))
    arrays = {name: torch.as_tensor(array) for name, array in loss.prepare(batch).items()}
    return lambda logits: loss(logits, arrays), batch


def test_answer_loss_is_plain_cross_entropy():
    loss, batch = packed([example(123.4), example(7)])
    logits = torch.randn(len(batch.targets), 300, generator=torch.Generator().manual_seed(0))
    real = batch.supervised
    expected = cross_entropy(logits[:real], torch.tensor(batch.targets[:real]), reduction="sum")
    torch.testing.assert_close(loss(logits), expected)


@pytest.mark.parametrize("encode", [digits, whole, pairs])
@pytest.mark.parametrize("price", [0.5, 7.0, 9.6, 98.0, 123.4, 999.2])
def test_soft_targets_equal_their_definition(encode, price):
    """q(token | path) by adding up q over the spellings that go on with it; the rest of the answer stays hard."""
    one, width = example(price, encode), 0.15
    loss, batch = packed([example(55.0, encode), one], "soft", encode, width)
    logits = torch.randn(len(batch.targets), 2100, generator=torch.Generator().manual_seed(1)).double()
    q = AnswerLoss("soft", PriceTree.build(encode), width, "cpu").neighbours([price])[0].double()
    spelt = [tuple(encode(str(n))) for n in range(PRICES)]
    begins = {s[:i] for s in spelt for i in range(len(s))}
    full = [s + tuple(encode(".")) if s in begins else s for s in spelt]
    expected, start = 0.0, batch.supervised - len(one.answer)
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
    q = AnswerLoss("soft", PriceTree.build(digits), 0.1, "cpu").neighbours([200.0, 3.0])
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
