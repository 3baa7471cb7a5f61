"""Batches: the loss mask, one shape for all, every item once an epoch, resuming."""

import random
from dataclasses import replace

import numpy as np
import pytest

from llama.tokenizer import Tokenizer
from pricing.data.batch import batches, count_batches, length_batches, pack, pack_epoch, shape_of
from pricing.data.items import Item
from pricing.data.prompt import PROMPT, Example, encode_items


@pytest.fixture
def tokenizer(tiny_directory):
    return Tokenizer.from_directory(tiny_directory)


def items_of(*texts):
    return [Item(str(n), t, t, 10.0 + n, "", "train") for n, t in enumerate(texts)]


def test_the_mask_covers_exactly_the_answer(tokenizer):
    items = items_of("a mug", "Price is $99.00 printed on the box\n\nPrice is $", "lamp")
    examples = encode_items(items, tokenizer, max_tokens=200)
    shape = shape_of(examples, 512)
    batch = pack(examples, shape)
    for item, example, start, end in zip(items, examples, batch.edges, batch.edges[1:], strict=False):
        assert tokenizer.decode(example.prompt) == PROMPT.replace("{text}", item.text)
        assert tokenizer.decode(example.answer) == f"{item.dollars}.00"
        assert batch.tokens[start:end].tolist() == example.prompt + example.answer[:-1]
        assert batch.positions[start:end].tolist() == list(range(end - start))
        predicted = {a + 1 - start: t for a, t in zip(batch.at, batch.targets, strict=True) if start <= a < end}
        predicted = {i: t for i, t in predicted.items() if t != -100}
        whole = example.prompt + example.answer
        assert predicted == {i: whole[i] for i in range(len(example.prompt), len(whole))}
    # What lies behind the items is filler: in sequences of its own, none too long, and never learnt.
    lengths = np.diff(batch.edges)
    assert len(batch.tokens) == 512 and lengths.sum() == 512 and lengths.max() <= shape.longest
    assert batch.at.max() < batch.real_tokens and sum(batch.targets >= 0) == sum(len(e.answer) for e in batch.examples)
    assert (np.diff(batch.slots)[np.diff(batch.positions) == 1] == 1).all() and len(set(batch.slots)) == 512
    with pytest.raises(ValueError, match="an item of .* tokens does not fit"):
        pack(examples, replace(shape, longest=shape.longest - 1))


def test_every_batch_has_the_same_shape_and_an_item_that_is_too_long_is_named():
    examples = [Example([1] * n, [2, 3], 1.0) for n in (5, 9, 30, 2, 2, 2)]
    shape = shape_of(examples, 40)
    for chosen in ([], examples[:2], examples[2:4]):
        arrays = vars(pack(chosen, shape))
        sizes = {k: v.shape for k, v in arrays.items() if isinstance(v, np.ndarray)}
        assert sizes["tokens"] == (40,) and sizes["edges"] == (shape.sequences + 1,) and sizes["at"] == (shape.answers,)
    with pytest.raises(ValueError, match="31 tokens does not fit into --batch-tokens 30"):
        shape_of(examples, 30)
    with pytest.raises(ValueError, match="do not fit"):
        pack(examples[1:3] * 2, shape)


def test_every_epoch_has_every_item_once_and_resumes_anywhere():
    rng = random.Random(0)
    examples = [Example([n] * rng.randint(3, 30), [n, n], float(n)) for n in range(200)]
    shape = shape_of(examples, 100)
    sizes = [count_batches(examples, shape, 3, n) for n in (1, 2, 3)]
    stream = batches(examples, shape, seed=3)
    flat = [next(stream) for _ in range(sizes[2])]
    for first, last in zip([0, *sizes], sizes, strict=False):
        assert sorted(e.price for batch in flat[first:last] for e in batch) == list(range(200))
    assert flat[: sizes[0]] != flat[sizes[0] : sizes[1]]
    real = sum(pack(batch, shape).real_tokens for batch in flat[: sizes[0]])
    assert real / (sizes[0] * shape.tokens) > 0.9  # little filler
    epochs = [pack_epoch(examples, shape, seed, 0) for seed in range(10)]
    read = [[sum(len(examples[i].prompt) for i in items) for items in epoch] for epoch in epochs]
    assert np.mean([np.argmin(sizes) / len(sizes) for sizes in read]) < 0.7  # the least filled does not come last
    for start in (0, 3, sizes[0], sizes[0] + 2):
        resumed = batches(examples, shape, seed=3, start=start)
        assert [next(resumed) for _ in range(len(flat) - start)] == flat[start:]
    assert next(batches(examples, shape, seed=4)) != flat[0]
    assert count_batches(examples, shape, 3, 0.5) == -(-sizes[0] // 2)


def test_the_arrays_of_a_step_are_those_of_the_batch():
    examples = [Example([1] * n, [2, 3], 1.0) for n in (5, 9)]
    shape = shape_of(examples, 40)
    batch = pack(examples, shape)
    arrays = batch.arrays()
    assert arrays.pop("rows") == batch.rows == 5  # two items, and 24 tokens of filler in pieces of at most 10
    assert arrays.pop("longest") == shape.longest == 10
    assert arrays.pop("edges").dtype == np.int32 and batch.arrays()["edges"].tolist() == [0, 6, 16, 26, 36, 40, 40, 40]
    assert set(arrays) == {"tokens", "positions", "slots", "at"}
    assert all(value is getattr(batch, name) for name, value in arrays.items())


def test_batches_by_length_cover_all_longest_first():
    prompts = [[0] * n for n in (3, 9, 1, 7, 5)]
    assert list(length_batches(prompts, 18)) == [[1, 3], [4, 0, 2]]
    assert list(length_batches(prompts, 1)) == [[1], [3], [4], [0], [2]]
