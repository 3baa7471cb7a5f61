"""Batches: whole items packed one after another into a fixed number of tokens, with the positions that carry the loss.

    python -m pytest tests/test_pricing.py -k batch

Between items there is no padding; behind the last, filler sequences (which nothing else sees) make up what is
missing. Every array of every batch then has the same size, whatever was packed: a GPU can replay one recorded step
(engine.py), and on a CPU the memory of one step fits the next.
"""

import math
import random
from dataclasses import dataclass
from typing import Iterator

import numpy as np

from pricing.data.prompt import Example

OPEN = 16  # batches being filled at a time; more fill better, and mix neighbours of the shuffled order a little more


@dataclass(frozen=True)
class Shape:
    """The sizes that all batches of a run share."""

    tokens: int  # N, filler included
    items: int  # at most
    longest: int  # tokens of the longest sequence, T
    answers: int  # M, supervised positions at most

    @property
    def sequences(self) -> int:
        """S: items, and the filler cut into pieces no longer than the longest item"""
        return self.items + self.tokens // self.longest + 1


@dataclass
class Batch:
    """The logits at packed index `at[i]` predict `targets[i]`, one place further on. Beyond what was packed, `at` is 0,
    `targets` is -100 (no loss) and sequences are filler, then empty."""

    tokens: np.ndarray  # (N,)
    positions: np.ndarray  # (N,) place within the sequence, from 0
    edges: np.ndarray  # (S + 1,) where each sequence begins, and N
    slots: np.ndarray  # (N,) sequence * T + position
    at: np.ndarray  # (M,) index of the token before each answer token
    targets: np.ndarray  # (M,) the answer tokens
    rows: int  # sequences that are not empty, filler included
    examples: list[Example]  # what it was packed from
    real_tokens: int  # read, filler not counted


def shape_of(examples: list[Example], budget: int) -> Shape:
    """Raises ValueError where an item alone does not fit into `budget` tokens."""
    lengths = [len(e.prompt) + len(e.answer) - 1 for e in examples]
    longest = max(lengths)
    if longest > budget:
        raise ValueError(f"an item of {longest} tokens does not fit into --batch-tokens {budget}; raise it")
    # Short items could come together by the dozen; a bound near what is usual keeps the arrays small.
    items = min(len(examples), math.ceil(1.25 * budget / (sum(lengths) / len(lengths))))
    return Shape(budget, items, longest, items * max(len(e.answer) for e in examples))


def pack(examples: list[Example], shape: Shape) -> Batch:
    """Raises ValueError where the examples exceed the shape."""
    # The last answer token is predicted but predicts nothing: it need not be read.
    pieces = [example.prompt + example.answer[:-1] for example in examples]
    lengths = [len(piece) for piece in pieces]
    supervised = sum(len(example.answer) for example in examples)
    longest = max(lengths, default=0)
    if sum(lengths) > shape.tokens or len(examples) > shape.items or supervised > shape.answers:
        raise ValueError(f"{len(examples)} items of {sum(lengths)} tokens do not fit into {shape}")
    if longest > shape.longest:
        raise ValueError(f"an item of {longest} tokens does not fit into {shape}")
    missing = shape.tokens - sum(lengths)
    filler = [shape.longest] * (missing // shape.longest) + [missing % shape.longest]
    lengths = np.array(lengths + [n for n in filler if n])
    ends = lengths.cumsum()
    tokens = np.zeros(shape.tokens, np.int64)  # any token will do for filler
    tokens[: shape.tokens - missing] = np.concatenate(pieces) if pieces else []
    positions = np.arange(shape.tokens) - np.repeat(ends - lengths, lengths)
    edges = np.full(shape.sequences + 1, shape.tokens)
    edges[0], edges[1 : len(ends) + 1] = 0, ends
    at, targets = np.zeros(shape.answers, np.int64), np.full(shape.answers, -100)
    if examples:
        at[:supervised] = np.concatenate(
            [np.arange(end - len(e.answer), end) for e, end in zip(examples, ends, strict=False)]
        )
        targets[:supervised] = np.concatenate([e.answer for e in examples])
    slots = np.repeat(np.arange(len(lengths)), lengths) * shape.longest + positions
    rows, real_tokens = len(lengths), shape.tokens - missing
    return Batch(tokens, positions, edges, slots, at, targets, rows, examples, real_tokens)


def plan(examples: list[Example], shape: Shape, seed: int, epoch: int) -> list[list[int]]:
    """Which items make up each batch of an epoch: a seeded shuffle, each item put into the first of OPEN batches that
    has room for it. Every item once; the last batches are short rather than dropped."""
    order = list(range(len(examples)))
    shuffle = random.Random(f"{seed}:{epoch}")
    shuffle.shuffle(order)
    done, filling = [], []  # filling: [tokens left, items]
    for index in order:
        size = len(examples[index].prompt) + len(examples[index].answer) - 1
        for box in filling:
            if size <= box[0] and len(box[1]) < shape.items:
                break
        else:
            if len(filling) == OPEN:
                fullest = min(filling, key=lambda box: box[0])
                filling.remove(fullest)
                done.append(fullest[1])
            box = [shape.tokens, []]
            filling.append(box)
        box[0] -= size
        box[1].append(index)
    done += [items for _, items in filling]
    shuffle.shuffle(done)  # else the short ones would all come last
    return done


def batches(examples: list[Example], shape: Shape, seed: int, start: int = 0) -> Iterator[list[Example]]:
    """The examples of one batch after another, epoch after epoch, without end.

    `start` skips that many batches, so that a resumed run sees what an unbroken one would.
    """
    epoch = 0
    while True:
        planned = plan(examples, shape, seed, epoch)
        for items in planned[start:]:
            yield [examples[i] for i in items]
        start, epoch = max(0, start - len(planned)), epoch + 1


def count_batches(examples: list[Example], shape: Shape, seed: int, epochs: float) -> int:
    """How many batches `epochs` passes take; a part of an epoch counts by its share of batches."""
    whole, part = divmod(epochs, 1)
    sizes = [len(plan(examples, shape, seed, epoch)) for epoch in range(math.ceil(epochs))]
    return sum(sizes[: int(whole)]) + (math.ceil(part * sizes[-1]) if part else 0)


def by_length(prompts: list[list[int]], budget: int) -> Iterator[list[int]]:
    """Indices in batches of similar length and at most `budget` tokens, longest first: the largest batch meets the
    memory limit at once, not at the end. At least one prompt a batch."""
    chosen: list[int] = []
    for i in sorted(range(len(prompts)), key=lambda i: -len(prompts[i])):
        if chosen and (len(chosen) + 1) * len(prompts[chosen[0]]) > budget:
            yield chosen
            chosen = []
        chosen.append(i)
    if chosen:
        yield chosen
