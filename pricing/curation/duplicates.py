"""Near-duplicates: texts that share most of their words in the same order.

Two texts are near-duplicates when the Jaccard similarity of their shingles, |A and B| / |A or B|, is at least a
threshold. A shingle is a pair of neighbouring words (lower case, without punctuation), stored as a 32-bit hash. In a
text of 100 words one changed word changes two shingles, so 0.8 allows five of them.

Comparing all pairs of a million texts would take too long. Among all candidates (`drop_near`) MinHash (Broder 1997, by
datasketch) finds the pairs to compare. In a random order of all shingles the smallest of A and the smallest of B are
the same with probability J(A, B). With `bands` bands of `rows` such minima each, two texts meet when a whole band
agrees; the probability is 1 - (1 - J^rows)^bands, at the threshold 0.999 or more (see `bands_for`). Texts that meet are
compared by their shingles, so only near-duplicates are dropped. Of the pairs at the threshold at most one in a thousand
is missed, fewer above it.

Between training and held-out items the search is exact, see leaks.py.
"""

from collections.abc import Iterable, Iterator
from itertools import chain
from zlib import crc32

import numpy as np

# What a byte becomes in a word: ASCII letters lower case; digits and all bytes above 127 the same; the rest a space.
WORD_BYTES = bytes(c if chr(c).isalnum() or c >= 128 else 32 for c in range(256)).lower()
MIXERS = np.array([0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB], np.uint64)  # of splitmix64
MOST_HASHES = 128  # minima of a text at most; more would cost more and find hardly any more
COMPARED = 16  # texts of one bucket at most that the others of it are compared with
BUCKET_ROWS = 1 << 18  # candidates sorted at a time, so that memory does not grow with them


def mix(values: np.ndarray, seed: int = 0) -> np.ndarray:
    """A hash of 64 bits of each value and the seed: the finaliser of splitmix64."""
    values = values + MIXERS[:1] * np.uint64(seed + 1)  # arrays, not scalars: their overflow gives no warning
    values = (values ^ (values >> np.uint64(30))) * MIXERS[1]
    values = (values ^ (values >> np.uint64(27))) * MIXERS[2]
    return values ^ (values >> np.uint64(31))


def words_in(text: str) -> list[bytes]:
    """The words of a text, as bytes: `Acme Mug, RED` is acme, mug, red."""
    return text.encode(errors="replace").translate(WORD_BYTES).split()


def shingles_of(texts: list[list[bytes]], single: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """The sets of shingles of texts, given as their words: (all shingles, text after text, uint32; how many each has).

    A set is sorted. A shingle is the hash of a pair of neighbouring words; with `single`, or in a text of one word, of
    the word itself.
    """
    lengths = np.array([len(words) for words in texts], np.int64)
    hashes = np.fromiter(map(crc32, chain.from_iterable(texts)), np.uint32, lengths.sum())
    owners = np.repeat(np.arange(len(texts), dtype=np.uint64), lengths)
    if not single and len(hashes):
        pairs = hashes[:-1] * np.uint32(0x9E3779B1) + (hashes[1:] ^ np.uint32(0x85EBCA6B))
        inside = owners[:-1] == owners[1:]
        alone = lengths[owners.astype(np.int64)] == 1
        hashes = np.concatenate([pairs[inside], hashes[alone]])
        owners = np.concatenate([owners[:-1][inside], owners[alone]])
    both = np.sort(owners << np.uint64(32) | hashes)
    both = both[np.concatenate([[True], both[1:] != both[:-1]])] if len(both) else both
    sizes = np.bincount((both >> np.uint64(32)).astype(np.int64), minlength=len(texts))
    return both.astype(np.uint32), sizes


def parts(shingles: np.ndarray, sizes: np.ndarray) -> list[np.ndarray]:
    """The set of each text, from what `shingles_of` returns"""
    ends = np.cumsum(sizes).tolist()
    return [shingles[end - size : end] for end, size in zip(ends, sizes.tolist())]


def check_threshold(threshold: float) -> None:
    """Raises ValueError for a threshold outside 0.3 to 1."""
    if not 0.3 <= threshold <= 1:
        raise ValueError(f"near-duplicates share 0.3 to 1 of their pairs of words, not {threshold}")


def similar(one: np.ndarray, other: np.ndarray, threshold: float) -> bool:
    """|A and B| >= threshold * |A or B|; False for a text without shingles."""
    less, more = sorted((len(one), len(other)))
    if not less or less < threshold * more - 1e-9:
        return False
    common = len(np.intersect1d(one, other, assume_unique=True))
    return common >= threshold * (less + more - common) - 1e-9


def bands_for(threshold: float) -> tuple[int, int]:
    """(bands, rows): the longest bands, at most MOST_HASHES minima in all, with which two texts at the threshold share
    a band with probability 1 - (1 - threshold^rows)^bands >= 0.999. Raises ValueError for one outside 0.3 to 1."""
    check_threshold(threshold)
    for rows in range(16, 0, -1):
        missed = max(1 - threshold**rows, 1e-9)  # by one band
        bands = int(np.ceil(np.log(0.001) / np.log(missed)))
        if bands * rows <= MOST_HASHES:
            return bands, rows


def band_keys(sets: list[np.ndarray], threshold: float, seed: int) -> np.ndarray:
    """(texts, bands) uint64: where two texts have the same key in a column, they share that band."""
    from datasketch import MinHash  # imported here: nothing but curation needs this library

    bands, rows = bands_for(threshold)
    # Shingles are hashes already. datasketch is given a whole array as one value, which saves a call for each hash.
    minhash = MinHash(num_perm=bands * rows, seed=seed % (1 << 32), hashfunc=lambda hashes: hashes)
    minima = np.empty((len(sets), bands * rows), np.uint64)
    for row, shingles in enumerate(sets):
        minhash.clear()
        if len(shingles):
            minhash.update_batch([shingles])
        minima[row] = minhash.hashvalues
    minima = minima.reshape(len(sets), bands, rows)
    keys = np.zeros((len(sets), bands), np.uint64)
    for row in range(rows):
        keys = mix(keys ^ minima[:, :, row])
    return keys


def buckets(keys: Iterable[tuple[int, np.ndarray]], fate: np.ndarray) -> Iterator[np.ndarray]:
    """For each key that two or more candidates have: those candidates, in order. `keys` yields (first candidate, the
    keys of it and the next ones) and is iterated several times. Candidates whose `fate` is not 0 are left out."""
    passes = -(-len(fate) // max(BUCKET_ROWS, len(fate) // 16))
    for number in range(passes):
        chosen, hashes = [], []
        for start, chunk in keys:
            here = np.flatnonzero((fate[start : start + len(chunk)] == 0) & (chunk % np.uint64(passes) == number))
            chosen.append(here + start)
            hashes.append(chunk[here])
        chosen, hashes = np.concatenate(chosen), np.concatenate(hashes)
        order = np.argsort(hashes, kind="stable")
        chosen, hashes = chosen[order], hashes[order]
        starts = np.flatnonzero(np.concatenate([[True], hashes[1:] != hashes[:-1]])) if len(hashes) else []
        lengths = np.diff(starts, append=len(hashes))
        for start, length in zip(starts, lengths):
            if length > 1:
                yield chosen[start : start + length]


def drop_exact(keys: Iterable, fate: np.ndarray, mark: int) -> int:
    """Give each candidate whose key an earlier one has the fate `mark`; returns how many."""
    dropped = 0
    for rows in buckets(keys, fate):
        fate[rows[1:]] = mark
        dropped += len(rows) - 1
    return dropped


def drop_near(columns: Iterable[Iterable], shingles, threshold: float, fate: np.ndarray, mark: int) -> int:
    """Give each near-duplicate of an earlier candidate that is still open the fate `mark`; returns how many.

    `columns` are the bands' keys, `shingles(candidate)` gives its set. Of a bucket with many different texts, only the
    first COMPARED are compared with the rest.
    """
    dropped = 0
    for keys in columns:
        for rows in buckets(keys, fate):
            staying = []
            for row in rows:
                own = shingles(row)
                if any(similar(own, other, threshold) for other in staying):
                    fate[row] = mark
                    dropped += 1
                elif len(staying) < COMPARED:
                    staying.append(own)
    return dropped
