"""Which candidates become items, and in which split: draw by price, split by title, look for leaks.

Each candidate has a fate, one byte: open, left out for a reason, or a split. All is streamed past that array.
"""

from collections.abc import Iterator

import numpy as np

from pricing.curation.candidates import Candidates
from pricing.curation.duplicates import mix, shingles_of, words_in
from pricing.curation.leaks import HeldOut
from pricing.curation.rules import Preset
from pricing.data.items import TEST_SHARE, VAL_SHARE

OPEN, EXACT, NEAR, NOT_DRAWN, BEYOND, LEAKED, TRAIN, VAL, TEST = range(9)
LEFT_OUT = {
    EXACT: "with the same words as an earlier one",
    NEAR: "that are near-duplicates of an earlier one",
    NOT_DRAWN: "not drawn, to balance prices",
    BEYOND: "beyond the sizes of the splits",
    LEAKED: "that are near-duplicates of a held-out item",
}
SPLITS = {TRAIN: "train", VAL: "val", TEST: "test"}


class Best:
    """The `capacity` largest of all scores it is shown, in memory for twice as many."""

    def __init__(self, capacity: int):
        self.capacity, self.scores, self.held, self.shown = capacity, [], 0, 0

    def add(self, scores: np.ndarray) -> None:
        self.scores.append(scores)
        self.held += len(scores)
        self.shown += len(scores)
        if self.held > 2 * self.capacity:
            self.scores = [np.partition(np.concatenate(self.scores), -self.capacity)[-self.capacity :]]
            self.held = self.capacity

    def least(self) -> float:
        """The least score among them; -inf where there is room for all"""
        if self.shown <= self.capacity:
            return -np.inf
        return np.partition(np.concatenate(self.scores), -self.capacity)[-self.capacity]


def scores(
    candidates: Candidates, fate: np.ndarray, preset: Preset, seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(open candidates, slots, scores): the largest log(u) / weight of each slot win, u in (0, 1) from a hash of seed
    and text. That is drawing by weight without replacement (Efraimidis and Spirakis 2006). A slot is a whole dollar
    below `preset.all_from`, if the preset draws by the dollar, or 0 for all the others.
    """
    low, high = np.inf, -np.inf  # dollars
    for start, batch in candidates.batches(["price"]) if preset.power else ():
        prices = batch["price"].to_numpy()[fate[start : start + len(batch)] == OPEN]
        low, high = min(low, prices.min(initial=low)), max(high, prices.max(initial=high))
    for start, batch in candidates.batches(["price", "category"]):
        here = fate[start : start + len(batch)] == OPEN
        prices, categories = batch["price"].to_numpy()[here], np.array(batch["category"].to_pylist())[here]
        uniform = ((mix(candidates.keys(0, start, len(batch))[here], seed) >> np.uint64(11)) + 0.5) * 2.0**-53
        with np.errstate(divide="ignore"):  # the second edition's cheapest item has weight 0: drawn last
            score = np.log(uniform) / preset.weight(prices, categories.tolist(), low, high)
        dollars = np.floor(prices + 0.5).astype(np.int64)
        slots = np.where((dollars < preset.all_from) & (preset.per_dollar is not None), dollars, 0)
        yield start + np.flatnonzero(here), slots, score


def draw(candidates: Candidates, fate: np.ndarray, preset: Preset, seed: int) -> None:
    """Set the fate of the open candidates that the preset has no room for, by `scores`."""
    best: dict[int, Best] = {}
    for _, slots, score in scores(candidates, fate, preset, seed):
        for slot in np.unique(slots).tolist():
            capacity = preset.per_dollar if slot else preset.drawn
            if capacity is not None:
                best.setdefault(slot, Best(capacity)).add(score[slots == slot])
    least = {slot: kept.least() for slot, kept in best.items()}
    for rows, slots, score in scores(candidates, fate, preset, seed):
        fate[rows[score < np.array([least.get(slot, -np.inf) for slot in slots.tolist()])]] = NOT_DRAWN


def split(candidates: Candidates, fate: np.ndarray, sizes: tuple[int, int, int], seed: int) -> None:
    """Give each open candidate a split, or BEYOND, by a seeded hash of the normalised title: the least are test, the
    next val, the next train. `sizes` are (train, val, test) items; val and test get at most 5 and 10 % of all. One
    title is on one side, so a split can be a few items short."""

    def hashes() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for start, keys in candidates.column(1):
            here = np.flatnonzero(fate[start : start + len(keys)] == OPEN)
            yield start + here, mix(keys[here], seed + 1)

    ordered = np.concatenate([np.empty(0, np.uint64), *(keys for _, keys in hashes())])
    ordered.sort()
    train, val, test = sizes
    test = min(test, len(ordered) * TEST_SHARE // 100)
    val = min(val, len(ordered) * VAL_SHARE // 100)
    ends = [end for end in (test, test + val, test + val + train) if end < len(ordered)]
    names = np.array([TEST, VAL, TRAIN, BEYOND], np.uint8)
    for rows, keys in hashes():
        fate[rows] = names[np.searchsorted(ordered[ends], keys, side="right")]


def held_chunks(candidates: Candidates, fate: np.ndarray, splits: tuple[int, ...]) -> Iterator:
    """("text" or "title", candidates of these splits, their shingles, how many each has), a chunk at a time"""
    for start, shingles, sizes in candidates.shingle_chunks():
        here = np.isin(fate[start : start + len(sizes)], splits)
        yield "text", start + np.flatnonzero(here), shingles[np.repeat(here, sizes)], sizes[here]
    for start, batch in candidates.batches(["title"]):
        here = np.flatnonzero(np.isin(fate[start : start + len(batch)], splits))
        titles = batch["title"].take(here).to_pylist()
        yield "title", start + here, *shingles_of([words_in(title) for title in titles], single=True)


def find_leaks(candidates: Candidates, fate: np.ndarray, threshold: float, remove: bool) -> dict:
    """Near-duplicates on two sides of the split: training items of val or test items, val items of test items, by the
    pairs of words in their texts or by the words in their titles. With `remove` those training and val items are left
    out. Returns how many items of each split have one, by text, by title, and in all."""
    found = {"text": [], "title": []}
    for kind, *chunk in held_chunks(candidates, fate, (VAL, TEST)):
        found[kind].append(chunk)
    leaking, index = {}, {}
    for kind, chunks in found.items():
        rows, shingles, sizes = (np.concatenate(parts) for parts in zip(*chunks))
        index[kind] = rows, HeldOut(shingles, sizes, threshold)
        leaking[kind] = np.zeros(len(fate), bool)
    removed = np.zeros(len(fate), bool)
    for kind, rows, shingles, sizes in held_chunks(candidates, fate, (TRAIN, VAL)):
        held, texts = index[kind]
        one, other = texts.pairs(shingles, sizes)
        one, other = rows[one], held[other]
        apart = (fate[one] == TRAIN) | (fate[other] == TEST)  # and not a val item with another, or with itself
        leaking[kind][one[apart]] = leaking[kind][other[apart]] = True
        removed[one[apart]] = True
    leaking["any"] = leaking["text"] | leaking["title"]
    counts = {
        name: {kind: int(np.sum(flags & (fate == code))) for kind, flags in leaking.items()}
        for code, name in SPLITS.items()
    }
    if remove:
        fate[removed] = LEAKED
    return counts
