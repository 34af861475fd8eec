"""Names of laws in figures."""

from __future__ import annotations

from collections.abc import Sequence

SYMBOLS = {"uniform": "U", "normal": "N", "exponential": "Exp", "chi2": "chi2", "zipf": "Zipf"}


def law(words: Sequence[str]) -> str:
    """`U(-5, 5)`, `N(0, 2)` (the second number is the variance), and so on, from a study's key."""
    name, *numbers = words
    values = [float(n) for n in numbers]
    if name == "normal":
        values[1] **= 2
    return f"{SYMBOLS[name]}({', '.join(f'{v:.3g}' for v in values)})"
