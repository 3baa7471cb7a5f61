"""Which candidates become items, and in which split: draw by price, split by title, look for leaks.

Each candidate has a fate, one byte: OPEN, a reason for being left out, or a split. Only that array is in memory; all
else is read from disk in parts.
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
    """The `capacity` largest of all scores that are added; at most twice as many are in memory."""

    def __init__(self, capacity: int):
        self.capacity, self.scores, self.stored, self.added = capacity, [], 0, 0

    def add(self, scores: np.ndarray) -> None:
        self.scores.append(scores)
        self.stored += len(scores)
        self.added += len(scores)
        if self.stored > 2 * self.capacity:
            self.scores = [np.partition(np.concatenate(self.scores), -self.capacity)[-self.capacity :]]
            self.stored = self.capacity

    def least(self) -> float:
        """The least of the largest scores; -inf where no more than `capacity` were added"""
        if self.added <= self.capacity:
            return -np.inf
        return np.partition(np.concatenate(self.scores), -self.capacity)[-self.capacity]


def scores(
    candidates: Candidates, fate: np.ndarray, preset: Preset, seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(open candidates, slots, scores), a part at a time. The score is log(u) / weight, with u in (0, 1) from a hash of
    seed and text; the largest of each slot are drawn. That is drawing by weight without replacement (Efraimidis and
    Spirakis 2006). If the preset draws by the dollar, each whole dollar below `preset.all_from` is a slot of its own;
    all other candidates are in slot 0.
    """
    low, high = np.inf, -np.inf  # dollars
    for start, batch in candidates.batches(["price"]) if preset.power else ():
        prices = batch["price"].to_numpy()[fate[start : start + len(batch)] == OPEN]
        low, high = min(low, prices.min(initial=low)), max(high, prices.max(initial=high))
    for start, batch in candidates.batches(["price", "category"]):
        here = fate[start : start + len(batch)] == OPEN
        prices, categories = batch["price"].to_numpy()[here], np.array(batch["category"].to_pylist())[here]
        uniform = ((mix(candidates.keys(0, start, len(batch))[here], seed) >> np.uint64(11)) + 0.5) * 2.0**-53
        with np.errstate(divide="ignore"):  # the second edition's cheapest item has weight 0 and comes last
            score = np.log(uniform) / preset.weight(prices, categories.tolist(), low, high)
        dollars = np.floor(prices + 0.5).astype(np.int64)
        slots = np.where((dollars < preset.all_from) & (preset.per_dollar is not None), dollars, 0)
        yield start + np.flatnonzero(here), slots, score


def draw(candidates: Candidates, fate: np.ndarray, preset: Preset, seed: int) -> None:
    """Set the fate of the open candidates that are not among the best of their slot, by `scores`, to NOT_DRAWN."""
    best: dict[int, Best] = {}
    for _, slots, score in scores(candidates, fate, preset, seed):
        for slot in np.unique(slots).tolist():
            capacity = preset.per_dollar if slot else preset.drawn
            if capacity is not None:
                best.setdefault(slot, Best(capacity)).add(score[slots == slot])
    least = {slot: largest.least() for slot, largest in best.items()}
    for rows, slots, score in scores(candidates, fate, preset, seed):
        fate[rows[score < np.array([least.get(slot, -np.inf) for slot in slots.tolist()])]] = NOT_DRAWN


def split(candidates: Candidates, fate: np.ndarray, sizes: tuple[int, int, int], seed: int) -> None:
    """Give each open candidate a split, or BEYOND, by a seeded hash of the normalised title: the smallest hashes are
    test, the next val, the next train. `sizes` are (train, val, test) items; val and test get at most 5 and 10 % of
    all. All items of a title are in one split, so a split can be a few items short."""

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


def shingle_parts(candidates: Candidates, fate: np.ndarray, splits: tuple[int, ...]) -> Iterator:
    """("text" or "title", candidates of these splits, their shingles, how many each has), a part at a time"""
    for start, shingles, sizes in candidates.shingle_chunks():
        here = np.isin(fate[start : start + len(sizes)], splits)
        yield "text", start + np.flatnonzero(here), shingles[np.repeat(here, sizes)], sizes[here]
    for start, batch in candidates.batches(["title"]):
        here = np.flatnonzero(np.isin(fate[start : start + len(batch)], splits))
        titles = batch["title"].take(here).to_pylist()
        yield "title", start + here, *shingles_of([words_in(title) for title in titles], single=True)


def find_leaks(candidates: Candidates, fate: np.ndarray, threshold: float, remove: bool) -> dict:
    """Find near-duplicates across the splits: training items of val or test items, and val items of test items, by the
    pairs of words in their texts or the words in their titles. With `remove` those training and val items are left out.
    Returns how many items of each split have a near-duplicate in another one, by text, by title, and by either."""
    held_out = {"text": [], "title": []}
    for kind, *chunk in shingle_parts(candidates, fate, (VAL, TEST)):
        held_out[kind].append(chunk)
    leaking, index = {}, {}
    for kind, chunks in held_out.items():
        rows, shingles, sizes = (np.concatenate(parts) for parts in zip(*chunks))
        index[kind] = rows, HeldOut(shingles, sizes, threshold)
        leaking[kind] = np.zeros(len(fate), bool)
    removed = np.zeros(len(fate), bool)
    for kind, rows, shingles, sizes in shingle_parts(candidates, fate, (TRAIN, VAL)):
        other_rows, texts = index[kind]
        one, other = texts.pairs(shingles, sizes)
        one, other = rows[one], other_rows[other]
        apart = (fate[one] == TRAIN) | (fate[other] == TEST)  # not two val items, or one with itself
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
