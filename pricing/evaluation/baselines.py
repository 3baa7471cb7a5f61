"""What the model has to beat: guesses that need no language model. All learn from the training split only.

    python evaluate.py --baselines

All but the constants learn the log of the price, so that errors count alike for cheap and expensive items, and guess
exp of it. Their settings were chosen on validation items, never on test items. Mean, median and ridge take a second
and always run; the others take minutes on a CPU, so guesses are stored in the user's cache.
"""

import hashlib
import json
import re
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from common.files import whole_file
from common.hub import cache_directory
from pricing.data.items import WORD, Item, sample
from pricing.distribution.intervals import in_dollars

LIMIT = 50_000  # training items at most for the forest, the boosting and the network: a fixed sample


def texts(items: list[Item]) -> list[str]:
    return [item.tagged for item in items]


def log_prices(items: list[Item]) -> np.ndarray:
    return np.log([item.price for item in items])


def same_origin(train: list[Item], test: list[Item]) -> list[Item]:
    """The training items of the test items' origins; all where there are none"""
    origins = {item.origin for item in test}
    return [item for item in train if item.origin in origins] or train


def constant_mean(train: list[Item], test: list[Item]) -> np.ndarray:
    """The mean training price, of the same origin, for all items: the "constant" of the reports."""
    return np.full(len(test), np.mean([item.price for item in same_origin(train, test)]))


def constant_median(train: list[Item], test: list[Item]) -> np.ndarray:
    """The median training price, of the same origin, for all items: the constant of least absolute error."""
    return np.full(len(test), np.median([item.price for item in same_origin(train, test)]))


def simple_features(items: list[Item], categories: list[str]) -> np.ndarray:
    """Length in characters and in words, how many numbers the text has, the least, mean and largest log(1 + number);
    then a 1 in the column of the item's category  # (items, 6 + categories)"""
    rows = []
    for item in items:
        numbers = re.findall(r"\d+(?:\.\d+)?", item.text)
        logs = np.log1p([min(float(number), 1e9) for number in numbers] or [0.0])
        counts = [len(item.text), len(item.text.split()), len(numbers), logs.min(), logs.mean(), logs.max()]
        rows.append(counts + [float(item.category == name) for name in categories])
    return np.array(rows)


def linear_simple(train: list[Item], test: list[Item]) -> np.ndarray:
    """Linear regression on simple_features, which read no words."""
    from sklearn.linear_model import LinearRegression

    categories = sorted({item.category for item in train})
    model = LinearRegression().fit(simple_features(train, categories), log_prices(train))
    return in_dollars(model.predict(simple_features(test, categories)))


def ridge_tfidf(train: list[Item], test: list[Item]) -> np.ndarray:
    """Ridge regression on tf-idf of words and word pairs."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import Ridge
    from sklearn.pipeline import make_pipeline

    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=WORD)
    model = make_pipeline(words, Ridge(alpha=1.0, solver="sparse_cg", tol=1e-4))
    return in_dollars(model.fit(texts(train), log_prices(train)).predict(texts(test)))


def on_word_counts(model, train: list[Item], test: list[Item], dense: bool) -> np.ndarray:
    """Guesses of `model`, a scikit-learn regressor, from how often each of the 1,000 commonest words occurs. It gets
    the counts as an array if `dense`, else as a sparse matrix."""
    from sklearn.feature_extraction.text import CountVectorizer

    train = sample(train, LIMIT)
    count = CountVectorizer(max_features=1000, token_pattern=WORD, dtype=np.float32)
    known, asked = count.fit_transform(texts(train)), count.transform(texts(test))
    if dense:
        known, asked = known.toarray(), asked.toarray()
    return in_dollars(model.fit(known, log_prices(train)).predict(asked))


def random_forest(train: list[Item], test: list[Item]) -> np.ndarray:
    """100 trees; each node chooses from a third of the words, as Breiman (2001) advises for regression."""
    from sklearn.ensemble import RandomForestRegressor

    model = RandomForestRegressor(n_estimators=100, max_features=1 / 3, n_jobs=-1, random_state=0)
    return on_word_counts(model, train, test, dense=False)


def gradient_boosting(train: list[Item], test: list[Item]) -> np.ndarray:
    """400 trees of 31 leaves, each fitted to the residuals of the earlier ones."""
    from sklearn.ensemble import HistGradientBoostingRegressor

    model = HistGradientBoostingRegressor(
        learning_rate=0.2, max_iter=400, min_samples_leaf=5, l2_regularization=1.0, early_stopping=False, random_state=0
    )
    return on_word_counts(model, train, test, dense=True)


class Block(nn.Module):
    """x + W2 dropout(relu(W1 norm(x)))"""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.change = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, width)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.change(x)


class ResidualNetwork(nn.Module):
    """The sum of the vectors of a text's words, three blocks, and a linear layer to the standardised log price."""

    def __init__(self, buckets: int, width: int = 512, dropout: float = 0.1) -> None:
        super().__init__()
        self.embed = nn.EmbeddingBag(buckets, width, mode="sum")
        nn.init.normal_(self.embed.weight, std=0.1)
        blocks = [Block(width, dropout) for _ in range(3)]
        self.read = nn.Sequential(nn.Dropout(dropout), *blocks, nn.LayerNorm(width), nn.Linear(width, 1))

    def forward(self, ids: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        """Word ids of all texts, one after the other (words,), and where each text begins (B,) -> (B,)"""
        return self.read(self.embed(ids, starts))[:, 0]


def residual_network(train: list[Item], test: list[Item], device: str | torch.device = "cpu") -> np.ndarray:
    """A residual network on words and word pairs hashed into 8,192 buckets, trained by the absolute error of the log
    price: AdamW, one-cycle schedule, 20 epochs, batches of a fiftieth of the items but 16 to 256."""
    from sklearn.feature_extraction.text import HashingVectorizer

    train = sample(train, LIMIT)
    hashing = HashingVectorizer(
        n_features=1 << 13, ngram_range=(1, 2), token_pattern=WORD, binary=True, alternate_sign=False, norm=None
    )
    target = log_prices(train)
    mean, spread = target.mean(), target.std() or 1.0
    target = torch.tensor((target - mean) / spread, dtype=torch.float32, device=device)
    known, asked = hashing.transform(texts(train)), hashing.transform(texts(test))

    def words(matrix) -> tuple[torch.Tensor, torch.Tensor]:
        return tuple(torch.from_numpy(part).long().to(device) for part in (matrix.indices, matrix.indptr[:-1]))

    on_gpu = torch.device(device).type == "cuda"
    with torch.random.fork_rng([torch.cuda.current_device()] if on_gpu else []):  # leaves the caller's random numbers
        torch.manual_seed(0)
        network = ResidualNetwork(hashing.n_features).to(device)
        optimiser = torch.optim.AdamW(network.parameters(), weight_decay=0.01, fused=True)
        batch = min(max(len(train) // 50, 16), 256)
        steps = 20 * -(-len(train) // batch)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=1e-3, total_steps=steps, pct_start=0.1)
        for _ in range(20):
            for rows in torch.randperm(len(train)).split(batch):
                loss = (network(*words(known[rows.numpy()])) - target[rows.to(device)]).abs().mean()
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
        network.eval()
        with torch.no_grad():
            guess = [network(*words(asked[start : start + 1024])).cpu() for start in range(0, len(test), 1024)]
    return in_dollars(torch.cat(guess).double().numpy() * spread + mean)


BASELINES = {
    "constant: mean": constant_mean,
    "constant: median": constant_median,
    "ridge on tf-idf": ridge_tfidf,
    "linear on simple features": linear_simple,
    "random forest": random_forest,
    "gradient boosting": gradient_boosting,
    "residual network": residual_network,
}
CHEAP = ("constant: mean", "constant: median", "ridge on tf-idf")


def run_baselines(train: list[Item], test: list[Item], every: bool, device: str | torch.device = "cpu") -> dict:
    """{name: {"seconds": to learn and guess, "guess": dollars (test items,)}} of all baselines (`every`), or of CHEAP.

    Guesses are stored in the user's cache under a hash of what decides them: the items, this file and the version of
    scikit-learn. (The network's last digits depend on the device, too; the first result stays.)
    """
    digest = hashlib.sha256(Path(__file__).read_bytes() + version("scikit-learn").encode())
    for items in (train, test):
        for item in items:
            digest.update(repr((item.tagged, item.category, item.split, item.price if items is train else 0)).encode())
    path = cache_directory() / "baselines" / f"{digest.hexdigest()[:32]}.json"
    try:
        results = json.loads(path.read_text())
    except (OSError, ValueError):  # missing or damaged: computed again
        results = {}
    names = list(BASELINES) if every else list(CHEAP)
    missing = [name for name in names if name not in results]
    for name in tqdm(missing, desc="baselines", unit="baseline", disable=not (every and missing)):
        started = time.perf_counter()
        guess = BASELINES[name](train, test, **({"device": device} if name == "residual network" else {}))
        seconds = round(time.perf_counter() - started, 2)
        results[name] = {"seconds": seconds, "guess": [round(float(g), 2) for g in guess]}
    if missing:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(path) as part:
                part.write_text(json.dumps(results))
        except OSError as error:  # a cache that may only be read
            print(f"the baselines' guesses are not kept: {error}", file=sys.stderr)
    return {name: results[name] | {"guess": np.array(results[name]["guess"])} for name in names}
