"""Batches: examples packed one after another, with the positions that carry the loss.

Between examples there is no padding; behind the last, a filler sequence (which nothing else sees) rounds N up to a
multiple of 128. Batches then come in a handful of sizes, and the memory of one step fits the next: on a CPU the
allocator no longer leaves holes of every size.
"""

import random
from dataclasses import dataclass
from typing import Iterator

from pricing.prompt import Example


@dataclass
class Batch:
    """N packed tokens. The logits at packed index `at[i]` predict the token `targets[i]`, one place further on."""

    tokens: list[int]  # (N,)
    lengths: list[int]  # tokens of each example, and of the filler if there is one
    at: list[int]  # (M,) index of the token before each answer token
    targets: list[int]  # (M,) the answer tokens
    examples: list[Example]  # (B,) what it was packed from

    @property
    def real_tokens(self) -> int:
        """Tokens that are read, filler not counted"""
        return sum(self.lengths[: len(self.examples)])


def pack(examples: list[Example], multiple: int = 128) -> Batch:
    batch = Batch([], [], [], [], examples)
    for example in examples:
        start = len(batch.tokens)
        first_answer = start + len(example.prompt)
        # The last answer token is predicted but predicts nothing: it need not be read.
        batch.tokens += example.prompt + example.answer[:-1]
        batch.lengths.append(len(batch.tokens) - start)
        batch.at += range(first_answer - 1, len(batch.tokens))  # the token before each answer token
        batch.targets += example.answer
    if filler := -len(batch.tokens) % multiple:
        batch.tokens += examples[0].prompt[:1] * filler  # any token will do
        batch.lengths.append(filler)
    return batch


def batches(examples: list[Example], size: int, seed: int, start: int = 0) -> Iterator[tuple[int, list[Example]]]:
    """(epoch, examples) without end: each epoch is its own seeded shuffle, its last batch short rather than dropped.

    `start` skips that many batches, so that a resumed run sees what an unbroken one would.
    """
    per_epoch = -(-len(examples) // size)
    epoch, first = divmod(start, per_epoch)
    while True:
        order = list(range(len(examples)))
        random.Random(f"{seed}:{epoch}").shuffle(order)
        for number in range(first, per_epoch):
            yield epoch, [examples[i] for i in order[number * size : (number + 1) * size]]
        epoch, first = epoch + 1, 0


def by_length(prompts: list[list[int]], size: int) -> Iterator[list[int]]:
    """Indices in batches of similar length, longest first: the largest batch meets the memory limit at once, not at
    the end."""
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    for start in range(0, len(order), size):
        yield order[start : start + size]
