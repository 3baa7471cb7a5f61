"""Leaks: near-duplicates (see pricing/duplicates.py) between training and held-out texts, all of them and no others.

If J(A, B) >= t, then A and B share at least ceil(t |A|) shingles, so wherever all shingles are ordered alike the first
|A| - ceil(t |A|) + 1 of A and as many of B have one in common. Ordered by rarity, few others do (prefix filter:
Chaudhuri, Ganti and Kaushik, ICDE 2006); fewer still have it so far in front that enough can follow (positional filter:
Xiao et al., WWW 2008). For what is left the similarity is counted out.
"""

from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np

from pricing.curation.duplicates import check_threshold, shingles_of, words_in


class HeldOut:
    """The held-out texts' shingles, indexed so that other texts find the near-duplicates among them: all, and only
    those. Memory goes with the held-out texts, never with the others."""

    def __init__(self, shingles: np.ndarray, sizes: np.ndarray, threshold: float):
        check_threshold(threshold)
        self.threshold, self.sizes = threshold, sizes
        # (text, shingle) in one number each, in order, as `shingles_of` leaves them
        self.elements = np.repeat(np.arange(len(sizes), dtype=np.uint64), sizes) << np.uint64(32) | shingles
        self.known, held = np.unique(shingles, return_counts=True)
        self.rank = np.empty(len(self.known), np.uint64)  # 0 for the rarest
        self.rank[np.lexsort((self.known, held))] = np.arange(len(self.known))
        self.maybe = np.zeros(1 << 24, bool)  # by the first 24 bits: a quick look that spares most searches
        self.maybe[self.known >> np.uint32(8)] = True
        ranks, owners, left = self.prefixes(shingles, sizes)
        order = np.argsort(ranks, kind="stable")
        self.ranks, self.owners, self.left = ranks[order], owners[order], left[order]

    def prefixes(self, shingles: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(ranks, texts, shingles from there on) of the rarest |A| - ceil(t |A|) + 1 shingles of each text, without
        those unknown here, which count as the rarest of all."""
        owners = np.repeat(np.arange(len(sizes), dtype=np.uint64), sizes)
        maybe = self.maybe[shingles >> np.uint32(8)]
        owners, shingles = owners[maybe], shingles[maybe]
        places = np.minimum(np.searchsorted(self.known, shingles), len(self.known) - 1)
        known = self.known[places] == shingles
        both = np.sort(owners[known] << np.uint64(32) | self.rank[places[known]])  # by text, then by rank
        owners, ranks = (both >> np.uint64(32)).astype(np.int64), both & np.uint64(0xFFFFFFFF)
        counts = np.bincount(owners, minlength=len(sizes))
        left = np.repeat(np.cumsum(counts), counts) - np.arange(len(both))
        chosen = left >= np.ceil(self.threshold * sizes - 1e-9)[owners]
        return ranks[chosen], owners[chosen], left[chosen]

    def pairs(self, shingles: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(texts, held-out texts): all near-duplicates of texts as `shingles_of` makes them; some may come twice."""
        ranks, owners, left = self.prefixes(shingles, sizes)
        first = np.searchsorted(self.ranks, ranks)
        counts = np.searchsorted(self.ranks, ranks, side="right") - first
        found = [(np.empty(0, np.int64),) * 2]
        for part in slices(counts):
            entry = np.repeat(np.arange(len(ranks))[part], counts[part])
            held = np.repeat(first[part], counts[part]) + within(counts[part])
            text, other = owners[entry], self.owners[held]
            # What is common to both lies behind the first common shingle, this one included.
            needed = self.threshold / (1 + self.threshold) * (sizes[text] + self.sizes[other]) - 1e-9
            enough = np.minimum(left[entry], self.left[held]) >= needed
            met = np.unique(text[enough] << 32 | other[enough])
            found.append(self.alike(shingles, sizes, met >> 32, met & 0xFFFFFFFF))
        return tuple(np.concatenate(side) for side in zip(*found))

    def alike(self, shingles, sizes, texts: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Those of some pairs whose similarity, counted out, is the threshold or more"""
        starts, common = np.cumsum(sizes) - sizes, np.zeros(len(texts), np.int64)
        for part in slices(sizes[texts]):
            lengths = sizes[texts[part]]
            own = shingles[np.repeat(starts[texts[part]], lengths) + within(lengths)]
            elements = np.repeat(others[part], lengths).astype(np.uint64) << np.uint64(32) | own
            places = np.minimum(np.searchsorted(self.elements, elements), len(self.elements) - 1)
            same = self.elements[places] == elements
            common[part] = np.bincount(np.repeat(np.arange(len(lengths)), lengths), same, len(lengths))
        either = sizes[texts] + self.sizes[others] - common
        chosen = common >= self.threshold * either - 1e-9
        return texts[chosen], others[chosen]


def within(lengths: np.ndarray) -> np.ndarray:
    """0, 1, ... up to each length, one run after the other: [2, 3] -> 0 1 0 1 2"""
    return np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)


def slices(lengths: np.ndarray, most: int = 1 << 20) -> Iterator[slice]:
    """Consecutive parts of about `most` in all each, so that a step's memory is bounded"""
    ends = np.cumsum(lengths)
    start = 0
    while start < len(lengths):
        stop = max(start + 1, int(np.searchsorted(ends, ends[start] - lengths[start] + most, side="right")))
        yield slice(start, stop)
        start = stop


def leaks(train_texts: Iterable[str], test_texts: Iterable[str], threshold: float = 0.8) -> list[int]:
    """Indices of the test texts with a near-duplicate among the training texts: max J(test, train) >= threshold, with J
    the Jaccard similarity of the pairs of neighbouring words. Exact, whatever the sizes; the training texts are
    streamed. Raises ValueError for a threshold outside 0.3 to 1.
    """
    held = HeldOut(*shingles_of([words_in(text) for text in test_texts]), threshold)
    train_texts, found = iter(train_texts), set()
    while batch := list(islice(train_texts, 1024)):
        found.update(held.pairs(*shingles_of([words_in(text) for text in batch]))[1].tolist())
    return sorted(found)
