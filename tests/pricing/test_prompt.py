"""Prompts: templates, and texts that are cut."""

import pytest

from llama.tokenizer import Tokenizer
from pricing.data.prompt import PROMPT, encode_prompt, load_prompt


@pytest.fixture
def tokenizer(tiny_directory):
    return Tokenizer.from_directory(tiny_directory)


def test_prompts_by_name_and_from_a_file(tmp_path):
    assert load_prompt("first") == PROMPT and load_prompt("compact").endswith("$")
    (tmp_path / "mine.txt").write_text("Dollars for {text}? $\n")
    assert load_prompt(str(tmp_path / "mine.txt")) == "Dollars for {text}? $"
    for text, words in (
        ("no place", "exactly once"), ("{text} {text} $", "exactly once"), ("costs {text}", "end where the price"),
        ("{text} costs ", "end where the price"), ("{text} costs $1", "end where the price"),
    ):  # fmt: skip
        (tmp_path / "bad.txt").write_text(text)
        with pytest.raises(ValueError, match=words):
            load_prompt(str(tmp_path / "bad.txt"))
    with pytest.raises(ValueError, match="neither first, second, compact nor a file"):
        load_prompt("third")


def test_long_texts_are_cut_but_never_the_question(tokenizer):
    full, full_cut = encode_prompt("x" * 500, tokenizer, 10_000)
    ids, cut = encode_prompt("x" * 500, tokenizer, 100)
    assert len(ids) == 100 and len(full) > 500 and cut and not full_cut
    assert tokenizer.decode(ids).startswith("How much does this cost") and tokenizer.decode(ids).endswith(
        "xx\n\nPrice is $"
    )
    with pytest.raises(ValueError, match="the question alone takes"):
        encode_prompt("x" * 500, tokenizer, 20)


def test_a_text_of_a_megabyte_is_cut_before_it_is_tokenised():
    """Of a text that is far too long, no more is looked at than could fit"""
    seen = []

    class Letters:
        def encode_prompt(self, text):
            seen.append(len(text))
            return [ord(letter) for letter in text]

    text = "mug" + " " * 1_000_000 + "red"
    ids, cut = encode_prompt(text, Letters(), 100)
    assert bytes(ids).decode().count("mug") == 1 and max(seen) < 10_000 and 0.99 < cut < 1
