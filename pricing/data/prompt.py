"""The question and the answer, as text and as token ids.

    How much does this cost to the nearest dollar?\\n\\n{text}\\n\\nPrice is $     ->     123.00

Prompt and answer are tokenised apart and their ids joined. So no token crosses the boundary, whatever the tokeniser
would merge there, and training and evaluation read the same ids. The loss mask is a position, the last n ids; the
answer is never searched for.
"""

from dataclasses import dataclass
from pathlib import Path

from pricing.data.items import Item
from pricing.data.rows import read_text

PROMPTS = {
    "first": "How much does this cost to the nearest dollar?\n\n{text}\n\nPrice is $",
    "second": "What does this cost to the nearest dollar?\n\n{text}\n\nPrice is $",
    "compact": "{text}\n$",
}
TOKEN_CHARACTERS = 64  # on average at most; of a text of a megabyte the rest is not even looked at
PROMPT = PROMPTS["first"]


def load_prompt(name: str) -> str:
    """A template by its name in PROMPTS or from a text file. Raises ValueError where it does not hold `{text}` exactly
    once, or does not end with "$" or another sign: most tokenisers would join a space at its end to the first digit."""
    if name in PROMPTS:
        return PROMPTS[name]
    path = Path(name)
    if not path.is_file():
        raise ValueError(f"--prompt {name} is neither {', '.join(PROMPTS)} nor a file")
    template = read_text(path).removesuffix("\n")
    if template.count("{text}") != 1:
        raise ValueError(f"{name}: a prompt must contain {{text}} exactly once")
    if template.endswith("{text}") or template[-1].isspace() or template[-1].isdigit():
        raise ValueError(f"{name}: a prompt must end where the price begins, with a sign such as $")
    return template


@dataclass(frozen=True)
class Example:
    """An item as token ids."""

    prompt: list[int]  # token ids up to and with the "$"
    answer: list[int]  # token ids of `123.00`; the loss is on these and nothing else
    price: float  # dollars
    cut: float = 0.0  # share of the text's characters that were cut off at its end, because it was too long


def answer_text(dollars: int) -> str:
    """`123.00` for 123"""
    return f"{dollars}.00"


def encode_prompt(text: str, tokenizer, max_tokens: int, template: str = PROMPT) -> tuple[list[int], float]:
    """(ids of the question around the item's text, what share of the text was cut off). Where the prompt is longer than
    `max_tokens`, the end of the text is cut off, never the question.

    `tokenizer` has encode_prompt, encode_answer and decode. Raises ValueError if the question alone does not fit.
    """

    whole, text = text, text[: max_tokens * TOKEN_CHARACTERS]

    def ids_of(part: str) -> list[int]:
        return tokenizer.encode_prompt(template.replace("{text}", part))

    ids = ids_of(text)
    if len(ids) <= max_tokens:
        return ids, 1 - len(text) / max(len(whole), 1)
    if len(ids_of("")) >= max_tokens:
        raise ValueError(f"the question alone takes {len(ids_of(''))} tokens, --max-tokens is {max_tokens}")
    # Cut characters, not ids: the ids of a shorter text are not always a prefix. Bisect for the longest that fits.
    low, high = 0, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if len(ids_of(text[:middle].rstrip())) <= max_tokens else (low, middle - 1)
    return ids_of(text[:low].rstrip()), 1 - low / len(whole)


def encode_items(items: list[Item], tokenizer, max_tokens: int, template: str = PROMPT) -> list[Example]:
    """An Example for each item. A prompt has at most `max_tokens` tokens; the answer adds up to 6."""
    examples = []
    for item in items:
        prompt, cut = encode_prompt(item.tagged, tokenizer, max_tokens, template)
        examples.append(Example(prompt, tokenizer.encode_answer(answer_text(item.dollars)), item.price, cut))
    return examples


def describe_cuts(examples: list[Example], max_tokens: int) -> str:
    """How many texts were cut, and how much of them; "" where none was"""
    cuts = [example.cut for example in examples if example.cut]
    if not cuts:
        return ""
    share = f"{sum(cuts) / len(cuts):.0%} of each on average"
    return f"{len(cuts):,} of {len(examples):,} texts are longer than --max-tokens {max_tokens}: {share} is cut off"
