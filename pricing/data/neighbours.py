"""What similar products cost: the nearest training items by tf-idf, as a line for the prompt.

    index = build(train_items)                      index.save(path)        Index.load(path)
    rows, similarity = index.nearest(items, k=5)    price_line(index.prices[rows[0][rows[0] >= 0]])

A text is a vector of its words and word pairs, each weighted by (1 + log tf) (1 + log((1 + n) / (1 + df))), as
scikit-learn's TfidfVectorizer does, scaled to length 1. The similarity of two texts is the cosine, 0 to 1.

An item is never its own neighbour, and neither is a training item of the same title or the same text: in training, its
price would give the answer away, which does not happen for a new product. Titles are compared as the split compares
them (letters and digits, lower case): a training item sees of the others what a test item sees of all.
"""

import hashlib
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.files import whole_file
from pricing.data.items import WORD, Item, normalise_title

INDEX = "neighbours.npz"  # the file in a checkpoint
CELLS = 2**24  # similarities computed at a time: 128 MiB


def key(text: str) -> int:
    """64 bits of the sha256 of the letters and digits of a text, lower case"""
    return int.from_bytes(hashlib.sha256(normalise_title(text).encode()).digest()[:8], "big")


def keys_of(items: list[Item]) -> np.ndarray:
    """The keys of each item's title and text  # (items, 2) uint64"""
    return np.array([(key(item.title), key(item.text)) for item in items], np.uint64).reshape(-1, 2)


def vectoriser(vocabulary: dict[str, int] | None = None):
    """The TfidfVectorizer of these words by column, or one that has to learn its words"""
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer(
        ngram_range=(1, 2), sublinear_tf=True, token_pattern=WORD, vocabulary=vocabulary, dtype=np.float32
    )


@dataclass
class Index:
    """The training items' texts as vectors, and their prices."""

    words: list[str]  # the vocabulary, by column
    idf: np.ndarray  # (W,) float32
    matrix: object  # scipy CSR (n, W) float32, rows of length 1
    prices: np.ndarray  # (n,) dollars
    keys: np.ndarray  # (n, 2) uint64, see keys_of

    def nearest(self, items: list[Item], k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k nearest training items of each item, nearest first: rows (items, k), and similarities (items, k).

        Where fewer than k share a word with an item, the rest of its rows are -1, their similarity 0. Raises ValueError
        for k below 1.
        """
        if k < 1:
            raise ValueError(f"--neighbours must be at least 1, got {k}")
        vectors = vectoriser({word: column for column, word in enumerate(self.words)})
        vectors.idf_ = self.idf
        asked, keys = vectors.transform([item.text for item in items]), keys_of(items)
        rows, similarity = np.full((len(items), k), -1), np.zeros((len(items), k), np.float32)
        size, known = max(1, CELLS // len(self.prices)), self.matrix.T.tocsr()
        for start in range(0, len(items), size):
            near = (asked[start : start + size] @ known).toarray()  # (size, n)
            for i, row in enumerate(near, start):
                row[(self.keys == keys[i]).any(axis=1)] = 0  # itself, and items of the same title or text
                least = np.partition(row, -k)[-k] if k < len(row) else 0
                best = np.flatnonzero((row >= least) & (row > 0))  # k of them, and what ties with the last
                best = best[np.lexsort((best, -row[best]))][:k]  # nearest first, earlier rows first among equals
                rows[i, : len(best)], similarity[i, : len(best)] = best, row[best]
        return rows, similarity

    def save(self, path: str | Path) -> None:
        """Write one .npz of plain arrays, without pickle, whole or not at all; the words as UTF-8, a line each."""
        arrays = {
            "words": np.frombuffer("\n".join(self.words).encode(), np.uint8),
            "idf": self.idf,
            "data": self.matrix.data,
            "indices": self.matrix.indices,
            "indptr": self.matrix.indptr,
            "prices": self.prices,
            "keys": self.keys,
        }
        with whole_file(path) as part, open(part, "wb") as handle:  # savez would add .npz to a name
            np.savez(handle, **arrays)

    @staticmethod
    def load(path: str | Path) -> "Index":
        """What `save` wrote. Raises ValueError where the file is missing or damaged."""
        from scipy.sparse import csr_matrix

        if not Path(path).is_file():
            raise ValueError(f"{path} does not exist: the run saved no neighbours")
        try:
            with np.load(path, allow_pickle=False) as arrays:
                words = arrays["words"].tobytes().decode().split("\n")
                prices, idf, keys = arrays["prices"], arrays["idf"], arrays["keys"]
                parts = arrays["data"], arrays["indices"], arrays["indptr"]
            matrix = csr_matrix(parts, shape=(len(prices), len(words)))
            if len(idf) != len(words) or keys.shape != (len(prices), 2):
                raise ValueError("its arrays do not fit together")
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} holds no neighbours: {' '.join(str(error).split())[:200]}") from None
        return Index(words, idf, matrix, prices, keys)


def build(train: list[Item]) -> Index:
    """The index of the training items. Raises ValueError where there is none, or one is of another split."""
    others = {item.split for item in train} - {"train"}
    if others or not train:
        raise ValueError(f"neighbours are training items; got {', '.join(sorted(others)) or 'no'} items")
    vectors = vectoriser()
    matrix = vectors.fit_transform([item.text for item in train]).tocsr()
    matrix.sort_indices()
    prices = np.array([item.price for item in train])
    return Index(vectors.get_feature_names_out().tolist(), vectors.idf_, matrix, prices, keys_of(train))


def price_line(prices) -> str:
    """`Similar products cost $12, $15 and $240.`: prices in dollars, in their order, rounded; "" for no prices."""
    amounts = [f"${np.floor(price + 0.5):.0f}" for price in prices]
    if len(amounts) < 2:
        return f"A similar product costs {amounts[0]}." if amounts else ""
    return f"Similar products cost {', '.join(amounts[:-1])} and {amounts[-1]}."


def with_neighbours(items: list[Item], template: str, index: Index | None, k: int) -> list[str]:
    """The prompt template of each item: `template` with a line below the text that names the prices of its k nearest
    neighbours; `template` itself for k = 0 or where there are none"""
    if not k:
        return [template] * len(items)
    rows, _ = index.nearest(items, k)
    lines = [price_line(index.prices[row[row >= 0]]) for row in rows]
    return [template.replace("{text}", "{text}\n" + line) if line else template for line in lines]
