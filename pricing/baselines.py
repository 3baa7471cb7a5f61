"""What the model has to beat: guesses that need no language model. All learn from the training split only."""

import numpy as np

from pricing.items import MAX_PRICE, MIN_PRICE, Item


def constant_mean(train: list[Item], test: list[Item]) -> np.ndarray:
    """The mean training price for everything: the "constant" of the reports."""
    return np.full(len(test), np.mean([item.price for item in train]))


def constant_median(train: list[Item], test: list[Item]) -> np.ndarray:
    """The median training price: of all constants the one with the least absolute error."""
    return np.full(len(test), np.median([item.price for item in train]))


def ridge_tfidf(train: list[Item], test: list[Item]) -> np.ndarray:
    """Ridge regression of log price on tf-idf of words and word pairs."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import Ridge
    from sklearn.pipeline import make_pipeline

    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\b\w[\w.]*\b")
    model = make_pipeline(words, Ridge(alpha=1.0, solver="sparse_cg", tol=1e-4))
    model.fit([item.text for item in train], np.log([item.price for item in train]))
    return np.clip(np.exp(model.predict([item.text for item in test])), MIN_PRICE, MAX_PRICE)


BASELINES = {
    "constant: mean": constant_mean,
    "constant: median": constant_median,
    "ridge on tf-idf": ridge_tfidf,
}
