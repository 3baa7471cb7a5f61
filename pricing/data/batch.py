"""Batches: whole items packed one after another into a fixed number of tokens, with the positions that carry the loss.

    python -m pytest tests/pricing/test_batch.py

There is no padding between items. After the last one, filler sequences, which no item attends to, fill the batch up.
So every array of every batch has the same size, whatever was packed: a GPU can replay one recorded step
(fast/graph.py), and on a CPU the next step reuses the memory of the last.
"""

import math
import random
from dataclasses import dataclass
from typing import Iterator

import numpy as np

from pricing.data.prompt import Example

OPEN = 16  # batches being filled at a time; more need less filler, but keep less of the shuffled order


@dataclass(frozen=True)
class Shape:
    """The sizes that all batches of a run share."""

    tokens: int  # N, filler included
    items: int  # in a batch, at most
    longest: int  # T, tokens of the longest sequence
    answers: int  # M, supervised positions in a batch, at most

    @property
    def sequences(self) -> int:
        """S, sequences at most: the items, and the filler cut into pieces no longer than the longest item"""
        return self.items + self.tokens // self.longest + 1


@dataclass
class Batch:
    """Packed items. The logits at packed index `at[i]` predict `targets[i]`, the token after it. Where fewer than M
    positions are supervised, the rest of `at` is 0 and of `targets` -100 (no loss); after the items' sequences come the
    filler's, then empty ones."""

    tokens: np.ndarray  # (N,)
    positions: np.ndarray  # (N,) place within the sequence, from 0
    edges: np.ndarray  # (S + 1,) where each sequence begins, and N
    slots: np.ndarray  # (N,) sequence * T + position
    at: np.ndarray  # (M,) index of the token before each answer token
    targets: np.ndarray  # (M,) the answer tokens
    rows: int  # sequences that are not empty, filler included
    longest: int  # T, Shape.longest
    examples: list[Example]  # what it was packed from
    real_tokens: int  # without the filler

    def arrays(self) -> dict[str, np.ndarray | int]:
        """What a training step reads, besides what the loss prepares: the arrays tokens, positions, slots (N,), at (M,)
        and edges (S + 1,) as int32, and the ints rows and longest."""
        arrays = {name: getattr(self, name) for name in ("tokens", "positions", "slots", "at")}
        return arrays | {"edges": self.edges.astype(np.int32), "rows": self.rows, "longest": self.longest}


def shape_of(examples: list[Example], budget: int) -> Shape:
    """The shape of all batches of `examples`, each of `budget` tokens. Raises ValueError for an item that is longer."""
    lengths = [len(e.prompt) + len(e.answer) - 1 for e in examples]
    longest = max(lengths)
    if longest > budget:
        raise ValueError(f"an item of {longest} tokens does not fit into --batch-tokens {budget}; raise it")
    # Many short items could meet in one batch; a bound a little above the usual number keeps the arrays small.
    items = min(len(examples), math.ceil(1.25 * budget / (sum(lengths) / len(lengths))))
    return Shape(budget, items, longest, items * max(len(e.answer) for e in examples))


def pack(examples: list[Example], shape: Shape) -> Batch:
    """One batch of these examples, in their order. Raises ValueError where they exceed the shape."""
    # The last answer token is predicted but predicts nothing, so it is not read.
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
    return Batch(
        tokens, positions, edges, slots, at, targets,
        rows=len(lengths), longest=shape.longest, examples=examples, real_tokens=shape.tokens - missing,
    )  # fmt: skip


def pack_epoch(examples: list[Example], shape: Shape, seed: int, epoch: int) -> list[list[int]]:
    """The items (indices) of each batch of an epoch: shuffled by the seed, then each put into the first of OPEN batches
    that has room for it. Every item comes once; batches that do not get full are kept."""
    order = list(range(len(examples)))
    shuffle = random.Random(f"{seed}:{epoch}")
    shuffle.shuffle(order)
    full, filling = [], []  # filling: [tokens left, items]
    for index in order:
        size = len(examples[index].prompt) + len(examples[index].answer) - 1
        for box in filling:
            if size <= box[0] and len(box[1]) < shape.items:
                break
        else:
            if len(filling) == OPEN:
                fullest = min(filling, key=lambda box: box[0])
                filling.remove(fullest)
                full.append(fullest[1])
            box = [shape.tokens, []]
            filling.append(box)
        box[0] -= size
        box[1].append(index)
    full += [items for _, items in filling]
    shuffle.shuffle(full)  # otherwise those with much filler would all come last
    return full


def batches(examples: list[Example], shape: Shape, seed: int, start: int = 0) -> Iterator[list[Example]]:
    """The examples of one batch after another, epoch after epoch, without end.

    `start` skips that many batches: a resumed run goes on with the batches that it had not seen yet.
    """
    epoch = 0
    while True:
        packed = pack_epoch(examples, shape, seed, epoch)
        for items in packed[start:]:
            yield [examples[i] for i in items]
        start, epoch = max(0, start - len(packed)), epoch + 1


def count_batches(examples: list[Example], shape: Shape, seed: int, epochs: float) -> int:
    """How many batches `epochs` passes take; 0.5 of an epoch is half of its batches, rounded up."""
    whole, part = divmod(epochs, 1)
    sizes = [len(pack_epoch(examples, shape, seed, epoch)) for epoch in range(math.ceil(epochs))]
    return sum(sizes[: int(whole)]) + (math.ceil(part * sizes[-1]) if part else 0)


def length_batches(prompts: list[list[int]], budget: int) -> Iterator[list[int]]:
    """Indices of the prompts in batches of similar length, each of at least one prompt and at most `budget` tokens
    if all were as long as its longest. The longest come first: if memory is short, the first batch shows it."""
    chosen: list[int] = []
    for i in sorted(range(len(prompts)), key=lambda i: -len(prompts[i])):
        if chosen and (len(chosen) + 1) * len(prompts[chosen[0]]) > budget:
            yield chosen
            chosen = []
        chosen.append(i)
    if chosen:
        yield chosen
