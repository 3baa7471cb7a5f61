"""The reference's own test: what is held out, what is learnt from, and the figures that were published about it."""

import json
import zipfile

import numpy as np
import pytest
from conftest import shared

from pricing.curation.leaks import leaks
from pricing.data import reference
from pricing.data.items import items_from_rows, normalise_title
from pricing.data.sources import load_sources


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """The raw files beside the project, in a cache as they would be downloaded"""
    archive, cache = shared("reference/raw.zip"), tmp_path_factory.mktemp("cache")
    (cache / "reference").mkdir()
    with zipfile.ZipFile(archive) as files:
        for file in reference.FILES:
            name = f"{file['repo'].split('/')[1]}/{file['commit'][:7]}/{file['path']}"
            target = cache / "reference" / f"{file['sha256'][:16]}-{file['path'].rpartition('/')[2]}"
            target.write_bytes(files.read(name))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QLORA_CACHE", str(cache))
        patch.setattr(reference, "RAW_URL", "http://127.0.0.1:9/{path}")  # nothing is fetched
        yield cache


def test_the_first_250_items_are_the_test_in_their_published_order(raw):
    items = load_sources("reference").items
    test = [item for item in items if item.split == "test"]
    assert [item.id for item in test] == [str(n) for n in range(1, 251)]
    assert test[0].price == 374.41 and test[0].text.startswith("OEM AC Compressor") and test[0].category == "Automotive"
    assert not any("nearest dollar" in item.text or "Price is" in item.text for item in items)
    assert sum(item.split == "test" for item in load_sources("reference:2000").items) == 2000
    assert sum(item.split == "test" for item in load_sources("reference:3").items) == 3


@pytest.mark.parametrize("data", ["reference", "reference:2000"])
def test_nothing_that_is_held_out_is_learnt_from(raw, data):
    loaded = load_sources(data)
    train = [item for item in loaded.items if item.split == "train"]
    held_out = [item for item in loaded.items if item.split != "train"]
    assert len(train) > 3700 and loaded.near > 0
    assert not leaks([item.text for item in train], [item.text for item in held_out])
    assert not {normalise_title(item.title) for item in train} & {normalise_title(item.title) for item in held_out}
    validation = [item for item in held_out if item.split == "val"]
    assert len(validation) > 70 and {item.origin for item in held_out} == {"reference"}


def test_the_published_errors_come_out_of_the_published_guesses(raw):
    price = np.array([item["price"] for item in reference.published_tests()["data"]])
    model, human = np.array(reference.published_tests()["guesses"]), np.array(reference.human_guesses())
    assert len(human) == 250
    np.testing.assert_allclose(np.abs(human - price[:250]).mean(), 126.55, atol=0.01)
    np.testing.assert_allclose(np.abs(model - price)[:250].mean(), 46.64, atol=0.01)
    np.testing.assert_allclose(np.abs(model - price).mean(), 53.70, atol=0.01)


def test_each_raw_file_has_a_commit_and_a_digest():
    for file in reference.FILES:
        assert len(file["commit"]) == 40 and len(file["sha256"]) == 64 and file["kind"] in ("test", "guesses", "train")
    assert len({file["sha256"] for file in reference.FILES}) == len(reference.FILES)


def test_a_changed_raw_file_is_refused(tmp_path, monkeypatch):
    (tmp_path / "human_output.csv").write_text("a mug,12\n")
    [entry] = [file for file in reference.FILES if file["kind"] == "guesses"]
    monkeypatch.setattr(reference, "FILES", [entry | {"path": "human_output.csv"}])
    monkeypatch.setattr(reference, "RAW_URL", tmp_path.as_uri() + "/{path}")
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    with pytest.raises(OSError, match="human_output.csv has sha256"):
        reference.human_guesses()


@pytest.mark.parametrize("data", ["reference:0", "reference:2001", "reference:abc", "reference:-3", "reference:²"])
def test_a_wrong_number_of_test_items_is_refused(data):
    with pytest.raises(ValueError, match=f"--data {data}: the test has 2,000 items"):
        load_sources(data)


QUESTIONS = {
    "How much does this cost?\n\nSteel mug\nHolds 300 ml. Is it safe?\n\n": "Steel mug\nHolds 300 ml. Is it safe?",
    "How much does this cost to the nearest dollar?\n\nSteel mug\nHolds 300 ml": "Steel mug\nHolds 300 ml",
    "¿Cuánto cuesta esto?\n\nSteel mug\nHolds 300 ml": "Steel mug\nHolds 300 ml",
    "Estimate the price.\n\nTitle: Steel mug  \nCategory: Cups  \nBrand: A": "Steel mug\nCategory: Cups\nBrand: A",
    "\n  Below are the details:\n  Title: Mug\n  Features: ['red', \"it's big\"]\n  ": "Mug\nFeatures: red it's big",
}  # fmt: skip


@pytest.mark.parametrize("question, product", QUESTIONS.items())
def test_the_product_is_found_in_the_question(question, product):
    assert " ".join(reference.product_of(question).split(" ")).replace("  ", " ").strip() == product


def test_the_price_is_the_number_at_the_end_of_the_answer(tmp_path):
    answers = ["Price is $1,299.00", "$49.99", "9.5", "El Precio es $18.87", "I cannot say", "Price is $"]
    lines = [
        {"messages": [{"content": "rules"}, {"content": f"How much?\n\nMug {n}"}, {"content": answer}]}
        for n, answer in enumerate(answers)
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    rows = list(reference.chat_rows(tmp_path / "a.jsonl", "second edition", "train"))
    assert [row["price"] for row in rows] == ["1,299.00", "49.99", "9.5", "18.87", None, None]
    items, skipped = items_from_rows(enumerate(rows, 1), "chat")
    assert [(item.title, item.price, item.origin) for item in items] == [
        ("Mug 1", 49.99, "second edition"), ("Mug 2", 9.5, "second edition"), ("Mug 3", 18.87, "second edition"),
    ]  # fmt: skip
    assert skipped.counts == {"rows without a price": 2, "rows with a price outside $0.50 to $999.49": 1}
