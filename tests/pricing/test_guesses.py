"""Other people's guesses: by id, by n, in order; files that do not fit; the reference's published ones."""

import numpy as np
import pytest
from test_reference import raw  # noqa: F401  (a fixture)

from pricing.data.items import Item
from pricing.data.sources import load_sources
from pricing.evaluation.guesses import is_reference, published_guesses, read_guesses

ITEMS = [Item(str(n), f"Mug {n}", f"Mug {n}", 10.0 * n, "", "test") for n in (3, 1, 2)]
FITTING = {
    "guess\n30\n10\n20\n": "in order",
    "id,guess\n1,10\n2,20\n3,30\n": "by id",
    "n,price,me,you\n1,10,10,7\n2,20,20,7\n3,30,30,7\n9,90,1,7\n": "a column of that name, by n, with one row more",
    'id,guess\n1,$10\n2,"20.00"\n3,"30"\n': "dollar signs",
    "\ufeffid,guess,truth\n1,10,10.004\n2,20,20\n3,30,30\n": "with a byte order mark",
}
WRONG = {
    "guess\n30\n10\n": "has 2 rows for 3 items; a column id",
    "id,guess\n1,10\n2,20\n": "lacks 1 of the 3 items, the first is id 3",
    "id,guess\n1,10\n1,11\n2,20\n3,30\n": "row 2: id 1 stands in row 1 already",
    "id,guess\n1,10\n2,about 20\n3,30\n": "row 2: guess is 'about 20'",
    "id,guess\n1,10\n2\n3,30\n": "row 2: guess is None",
    "guess\nnan\n10\n20\n": "row 1: guess is 'nan'",
    "guess\n30\ninf\n20\n": "row 2: guess is 'inf'",
    "guess\n30\n-1\n20\n": "row 2: guess is '-1'",
    "id,price,guess\n1,10,10\n2,99,20\n3,30,30\n": "row 2: price is 99, the item's price is 20.00: guesses of other",
    "id,answer\n1,10\n": "has no column guess or me; it has id, answer",
    "": "has no column guess or me",
    'guess\n"30\n10\n20\n': "is no CSV file in UTF-8",
}


@pytest.mark.parametrize("text, _", FITTING.items())
def test_guesses_are_put_beside_their_items(tmp_path, text, _):
    (tmp_path / "a.csv").write_text(text, encoding="utf-8")
    read = read_guesses(f"me={tmp_path / 'a.csv'}", ITEMS)
    assert (read.name, read.items) == ("me", [0, 1, 2]) and read.guess.tolist() == [30, 10, 20]


@pytest.mark.parametrize("text, message", WRONG.items())
def test_a_file_that_does_not_fit_is_refused(tmp_path, text, message):
    (tmp_path / "a.csv").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=f"a.csv.*{message}"):
        read_guesses(f"me={tmp_path / 'a.csv'}", ITEMS)


def test_a_file_that_is_no_text_or_not_there_is_refused(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"guess\n\xff\xfe\n")
    with pytest.raises(ValueError, match="a.csv is no CSV file in UTF-8"):
        read_guesses(f"me={tmp_path / 'a.csv'}", ITEMS)
    with pytest.raises(ValueError, match="b.csv does not exist"):
        read_guesses(f"me={tmp_path / 'b.csv'}", ITEMS)


def test_other_items_are_not_taken_for_the_references():
    assert not is_reference(ITEMS)


def test_the_published_guesses_stand_beside_their_items(raw):  # noqa: F811
    test = [item for item in load_sources("reference").items if item.split == "test"]
    assert is_reference(test) and not is_reference(test[5:])
    by_name = {other.name: other for other in published_guesses(test)}
    price = np.array([item.price for item in test])
    human, model = by_name["human (published)"], by_name["Llama 3.1 8B, QLoRA on 400,000 items (published)"]
    np.testing.assert_allclose(np.abs(human.guess - price).mean(), 126.55, atol=0.01)
    np.testing.assert_allclose(np.abs(model.guess - price).mean(), 46.64, atol=0.01)
    assert by_name["GPT-4o (published)"].metrics["mae"] == 75.918 and by_name["GPT-4o (published)"].guess is None

    backwards = published_guesses(test[::-1])  # by their texts, in whatever order they come
    assert np.array_equal(backwards[0].guess, human.guess[::-1])
    fewer = published_guesses(test[:100])  # a mean of 250 says nothing of 100
    assert [other.name for other in fewer] == [human.name, model.name] and len(fewer[0].items) == 100


def test_of_all_2000_items_a_person_guessed_250(raw):  # noqa: F811
    test = [item for item in load_sources("reference:2000").items if item.split == "test"]
    human, model = published_guesses(test)
    assert human.items == list(range(250)) and model.items == list(range(2000))
    price = np.array([item.price for item in test])
    np.testing.assert_allclose(np.abs(model.guess - price).mean(), 53.70, atol=0.01)
