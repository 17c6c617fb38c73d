"""Format placeholders ("%(name)s", "{}") as separate subwords.

The model learns to place them and never has to spell them.
"""

from __future__ import annotations

import re

PLACEHOLDER = re.compile(r"%\(\w+\)[a-z]|%[a-z%]|\{\w*\}")
SYMBOLS = tuple(f"⟦{number}⟧" for number in range(1, 9))


def hide(text: str, found: list[str], add: bool = True) -> str:
    """Return ``text`` with a symbol for each placeholder: the n-th of ``found`` becomes the n-th symbol.

    Args:
        found: placeholders so far. With ``add`` new ones are appended to it, as long as there are symbols. Others stay
            in the text.
    """

    def symbol(match: re.Match[str]) -> str:
        if add and match[0] not in found and len(found) < len(SYMBOLS):
            found.append(match[0])
        return SYMBOLS[found.index(match[0])] if match[0] in found else match[0]

    return PLACEHOLDER.sub(symbol, text)


def restore(text: str, found: list[str]) -> str:
    """Replace the symbols in ``text`` by their placeholders; a symbol without a placeholder is removed."""
    for number, symbol in enumerate(SYMBOLS):
        text = text.replace(symbol, found[number] if number < len(found) else "")
    return text
