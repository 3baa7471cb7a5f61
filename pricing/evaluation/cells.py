"""Cells of CSV files that people open in spreadsheets: text that would run as a formula there, made harmless.

    csv.writer(file).writerow([guarded(item.title)])          # '=2+3 for =2+3
    [title] = map(unguarded, row)                             # =2+3 again

A spreadsheet takes a cell that begins with = + - @ or a tab for a formula, which may fetch or send anything. Such a
cell gets an apostrophe in front, and so does one that has apostrophes before such a sign: taking one away gives back
what was there, whatever it was.
"""

import re

# The last four are the same signs in full width, which some spreadsheets take for them.
FORMULA = re.compile("'*(?:[\t\r\n]|\\s*[=+\\-@\uff1d\uff0b\uff0d\uff20])")


def guarded(cell: str) -> str:
    """The cell, with an apostrophe in front where it would be a formula"""
    return f"'{cell}" if FORMULA.match(cell) else cell


def unguarded(cell: str) -> str:
    """What `guarded` was given"""
    return cell[1:] if cell.startswith("'") and FORMULA.match(cell) else cell
