"""The distribution over whole dollars against brute force, on tokenisers of every kind and a tiny model."""

import re
from functools import partial

import numpy as np
import pytest
import torch
from conftest import our_model

from llama.attention import Layout
from llama.generate import extend, prefill
from pricing.distribution.decode import PRICES, PriceTree, greedy_prices, pick, price_distribution

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
    """A fixed random function from token ids to log-probabilities, with the interface of llama.generate.prefill and
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
    got, _ = price_distribution(partial(prefill, model), partial(extend, model), PROMPTS, tree)

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
        together, _ = price_distribution(partial(prefill, model), partial(extend, model), PROMPTS, tree, prune)
        reverse, _ = price_distribution(partial(prefill, model), partial(extend, model), PROMPTS[::-1], tree, prune)
        np.testing.assert_allclose(together, reverse[::-1], rtol=1e-3, atol=1e-9)
        for row, prompt in enumerate(PROMPTS):
            alone, _ = price_distribution(partial(prefill, model), partial(extend, model), [prompt], tree, prune)
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


def test_pruning_goes_by_what_names_a_price():
    """A model that hardly ever writes a price says as much by those it does."""
    _, prefill, extend = random_model(sharpness=0.3, digit_bias=3.0)
    tree = PriceTree.build(digits)
    exact, named = price_distribution(prefill, extend, PROMPTS, tree)
    pruned, _ = price_distribution(prefill, extend, PROMPTS, tree, 1e-3)
    assert named.max() < 0.1 and (np.abs(pruned - exact).sum(1) / 2).max() < 0.05


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
                behind = int(log_probs([*prompt, *path]).argmax())
                goes_on = behind == ord(",") or any(behind in encode(str(n)) for n in range(PRICES))
                expected = np.nan if goes_on else letters.get(path, np.nan)
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
    # What is written is 1,000 and more, not 1, 12 or 100; a digit behind "." belongs to the cents.
    assert np.isnan([scripted(t) for t in ("1,000.00", "12,500", "123,456", "1000.00", "1000")]).all()
    assert [scripted(t) for t in ("100.00", "999", "1", "0.99", "100 000", "5.0000")] == [100, 999, 1, 0, 100, 5]


@pytest.mark.parametrize(
    "encode, written", [(whole, [1001, 44]), (whole, [1100, 1000]), (pairs, [49, 44]), (digits, [49, 44])]
)
def test_a_number_that_goes_on_is_no_price_for_any_tokeniser(encode, written):
    """ "1" and ",", "100" and "0" """

    def prefill(prompts, choices):
        return None, torch.tensor(written[:1]), [0]

    def extend(cache, tokens, parents, choices):
        cache[0] += 1
        return None, torch.full(tokens.shape, written[cache[0]] if cache[0] < len(written) else 2)

    assert np.isnan(greedy_prices(prefill, extend, [[1]], PriceTree.build(encode))).all()


def test_picks_by_hand():
    p = np.zeros((2, PRICES))
    p[0, [10, 20, 90]] = [0.5, 0.2, 0.3]
    p[1, 999] = 1
    assert pick(p, "mode").tolist() == [10, 999]
    np.testing.assert_allclose(pick(p, "mean"), [0.5 * 10 + 0.2 * 20 + 0.3 * 90, 999])
    np.testing.assert_allclose(pick(p, "log-mean"), [10**0.5 * 20**0.2 * 90**0.3, 999])
    np.testing.assert_allclose(pick(np.eye(PRICES)[:1], "log-mean"), [0.5])  # $0 stands for what is below 50 cents
    with pytest.raises(ValueError, match="unknown way"):
        pick(p, "best")


def test_an_answer_that_leaves_the_tree_is_refused():
    """A tokeniser with ".00" in one piece: training would teach a token that scoring never asks about."""

    def one_piece(text):
        return [ord(c) for c in text.removesuffix(".00")] + [299] * text.endswith(".00")

    with pytest.raises(ValueError, match='do not begin with "0", "."|do not begin with "1", "."'):
        PriceTree.build(one_piece)


def test_senseless_spelling_and_broken_models_are_refused():
    with pytest.raises(ValueError, match="gives two of them the same ids, or splits a dot"):
        PriceTree.build(lambda text: [7])
    nan = torch.full((1, 11), float("nan"))
    with pytest.raises(ValueError, match="no finite probability"):
        price_distribution(lambda p, c: (nan, None, None), None, [[1]], PriceTree.build(digits), prune=0.1)
