"""Tables, times and sizes for the terminal. Imports nothing of the package."""

from __future__ import annotations

from collections.abc import Container, Sequence

UNITS = ((86_400.0, "d"), (3_600.0, "h"), (60.0, "min"), (1.0, "s"), (1e-3, "ms"))


def aligned(rows: Sequence[Sequence[str]], left: Container[int] = (0,)) -> list[str]:
    """Rows as lines of columns; those in `left` begin, the others end together. Blanks at the ends of lines go."""
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True))
        ).rstrip()
        for r in rows
    ]


def roughly(seconds: float | None) -> str:
    """Two or three digits and a unit from milliseconds to days; `-` for None."""
    if seconds is None:
        return "-"
    factor, unit = next((u for u in UNITS if seconds >= u[0]), UNITS[-1])
    value = seconds / factor
    return f"{value:.0f} {unit}" if value >= 10 else f"{value:.1f} {unit}"


def size(number: float | None) -> str:
    """Bytes in KiB to TiB; `-` for None."""
    if number is None:
        return "-"
    for unit in ("KiB", "MiB", "GiB"):
        number /= 1024
        if number < 1000:
            return f"{number:.0f} {unit}" if number >= 10 else f"{number:.1f} {unit}"
    return f"{number / 1024:.1f} TiB"


def count(n: int, what: str) -> str:
    """`1 cell`, `2 cells`."""
    return f"{n} {what}" + "s" * (n != 1)


def between(values: Sequence[float], form: str = ".1f") -> str:
    """`low to high`, or the one value that all show as."""
    ends = [format(v, form) for v in (min(values), max(values))]
    return " to ".join(dict.fromkeys(ends))
