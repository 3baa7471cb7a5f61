"""Items whose text says what they cost: to price these is to read.

    states_price("Mug. Now only $12.99!", 12.99)          # True
"""

import re

from pricing.data.items import Item

AMOUNT = re.compile(r"(?<![\d.,])\d{1,3}(\.\d{2})?(?!\d|[.,]\d)")
WORDS = r"\$|\bUSD?|\bprice[ds]?(?: is| at)?:?|\bonly|\bcosts?:?"
BEFORE = re.compile(rf"(?:{WORDS})\s{{0,2}}(?:US\s?)?\$?\s?$", re.IGNORECASE)
AFTER = re.compile(r"\s?(?:\$|USD\b|US dollars|dollars\b)", re.IGNORECASE)


def states_price(text: str, price: float) -> bool:
    """Does the text name the price, in dollars? With its cents (12.99), or in whole dollars where a word or sign says
    that it is an amount of money ($13, 13 USD, price: 13): a bare 13 may count anything."""
    for amount in AMOUNT.finditer(text):
        dollars = float(amount[0])
        if amount[1] and abs(dollars - price) < 0.005:
            return True
        if not amount[1] and dollars == int(price + 0.5):
            before = text[max(0, amount.start() - 24) : amount.start()]
            if BEFORE.search(before) or AFTER.match(text, amount.end()):
                return True
    return False


def stated(items: list[Item]) -> list[int]:
    """Which of the items have their price in their text"""
    return [number for number, item in enumerate(items) if states_price(item.text, item.price)]
