"""Leaks: near-duplicates (see duplicates.py) between training and held-out texts; the search is exact.

If J(A, B) >= t, then A and B share at least ceil(t |A|) shingles. So in any common order of all shingles, the first
|A| - ceil(t |A|) + 1 of A and the first |B| - ceil(t |B|) + 1 of B have one in common. Ordered by rarity, few other
pairs do (prefix filter: Chaudhuri, Ganti and Kaushik, ICDE 2006), and of these only some have it early enough that
enough can follow (positional filter: Xiao et al., WWW 2008). For the pairs that are left the similarity is computed.
"""

from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np

from pricing.curation.duplicates import check_threshold, shingles_of, words_in


class HeldOut:
    """The held-out texts' shingles, indexed so that `pairs` finds all their near-duplicates among other texts. Memory
    grows with the held-out texts, not with the others."""

    def __init__(self, shingles: np.ndarray, sizes: np.ndarray, threshold: float):
        check_threshold(threshold)
        self.threshold, self.sizes = threshold, sizes
        # (text, shingle) as one number each, sorted, as `shingles_of` returns them
        self.elements = np.repeat(np.arange(len(sizes), dtype=np.uint64), sizes) << np.uint64(32) | shingles
        self.known, counts = np.unique(shingles, return_counts=True)
        self.rank = np.empty(len(self.known), np.uint64)  # 0 for the rarest
        self.rank[np.lexsort((self.known, counts))] = np.arange(len(self.known))
        self.maybe = np.zeros(1 << 24, bool)  # by a shingle's first 24 bits: a quick test that saves most searches
        self.maybe[self.known >> np.uint32(8)] = True
        ranks, owners, left = self.prefixes(shingles, sizes)
        order = np.argsort(ranks, kind="stable")
        self.ranks, self.owners, self.left = ranks[order], owners[order], left[order]

    def prefixes(self, shingles: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(ranks, texts, how many of the text's shingles follow, itself included) of the rarest |A| - ceil(t |A|) + 1
        shingles of each text; without those that no held-out text has, which count as the rarest of all."""
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
        """(texts, held-out texts): all pairs of near-duplicates, some of them twice. `shingles` and `sizes` are what
        `shingles_of` returns for the texts."""
        ranks, owners, left = self.prefixes(shingles, sizes)
        first = np.searchsorted(self.ranks, ranks)
        counts = np.searchsorted(self.ranks, ranks, side="right") - first
        pairs = [(np.empty(0, np.int64),) * 2]
        for part in slices(counts):
            entry = np.repeat(np.arange(len(ranks))[part], counts[part])
            match = np.repeat(first[part], counts[part]) + within(counts[part])
            text, other = owners[entry], self.owners[match]
            # All that both have in common comes after the first common shingle, this one included.
            needed = self.threshold / (1 + self.threshold) * (sizes[text] + self.sizes[other]) - 1e-9
            enough = np.minimum(left[entry], self.left[match]) >= needed
            met = np.unique(text[enough] << 32 | other[enough])
            pairs.append(self.alike(shingles, sizes, met >> 32, met & 0xFFFFFFFF))
        return tuple(np.concatenate(side) for side in zip(*pairs))

    def alike(self, shingles, sizes, texts: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of these pairs, those whose similarity is the threshold or more"""
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
    """0, 1, ... up to below each length, one range after the other: [2, 3] -> 0 1 0 1 2"""
    return np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)


def slices(lengths: np.ndarray, most: int = 1 << 20) -> Iterator[slice]:
    """Consecutive slices whose lengths add up to about `most` each, so that memory is bounded"""
    ends = np.cumsum(lengths)
    start = 0
    while start < len(lengths):
        stop = max(start + 1, int(np.searchsorted(ends, ends[start] - lengths[start] + most, side="right")))
        yield slice(start, stop)
        start = stop


def near_pairs(texts: Iterable[str], held_out: Iterable[str], threshold: float = 0.8) -> Iterator[tuple[int, int]]:
    """(index of a text, index of a held-out text) of all near-duplicates, some pairs twice: J >= threshold, with J the
    Jaccard similarity of the pairs of neighbouring words. Exact; `texts` are streamed. Raises ValueError for a
    threshold outside 0.3 to 1."""
    index = HeldOut(*shingles_of([words_in(text) for text in held_out]), threshold)
    texts, start = iter(texts), 0
    while batch := list(islice(texts, 1024)):
        ours, others = index.pairs(*shingles_of([words_in(text) for text in batch]))
        yield from zip((ours + start).tolist(), others.tolist(), strict=True)
        start += len(batch)


def leaks(train_texts: Iterable[str], test_texts: Iterable[str], threshold: float = 0.8) -> list[int]:
    """Indices of the test texts with a near-duplicate among the training texts; arguments as of `near_pairs`."""
    return sorted({test for _, test in near_pairs(train_texts, test_texts, threshold)})
