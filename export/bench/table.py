"""A benchmark as text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .result import Result
from .statistics import Ratio, Summary, ratios, summarize

Row = tuple[str, ...]
HEADER = ("case", "engine", "n", "p50", "p90", "p99", "p90/p10", "audio s/s", "RTF", "do not quote")
RATIO_HEADER = ("case", "engine", "against", "ratio", "p10", "p90")
SCALES = {"s": ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")), "bytes": ((2.0**30, "GiB"), (2.0**20, "MiB"), (1.0, "B"))}


def quantity(value: float | None, unit: str) -> str:
    """Three significant digits with a unit that suits; a dash for None."""
    if value is None:
        return "–"
    scale, name = next((s for s in SCALES[unit] if value >= s[0]), SCALES[unit][-1])
    return f"{number(value / scale)} {name}"


def number(value: float | None) -> str:
    """Three significant digits, without an exponent where that stays readable; a dash for None."""
    if value is None:
        return "–"
    return f"{value:.0f}" if 100 <= value < 1e6 else f"{value:.3g}"


def rows(result: Result) -> list[Row]:
    """The cells of each case, below `HEADER`."""
    return [_row(summary) for summary in summarize(result)]


def _row(s: Summary) -> Row:
    times = (quantity(value, s.case.unit) for value in (s.p50, s.p90, s.p99))
    doubts = ", ".join(s.doubts)
    return (s.case.label, s.case.engine, str(len(s.case.observations)), *times, *map(number, (s.spread, s.throughput, s.rtf)), doubts)


def ratio_rows(result: Result) -> list[Row]:
    """The cells of each ratio between engines, below `RATIO_HEADER`; none with one engine."""
    return [_ratio_row(ratio) for ratio in ratios(result)]


def _ratio_row(r: Ratio) -> Row:
    return (r.case.label, r.case.engine, r.first, *(f"{value:.3f}" for value in (r.p50, r.p10, r.p90)))


def aligned(header: Row, rows: Sequence[Row], left: int = 2) -> str:
    """Columns under each other; the first `left` ones and the last are words, the others numbers."""
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    sides: list[Callable[..., str]] = [str.ljust if i < left or i == len(header) - 1 else str.rjust for i in range(len(header))]
    return "\n".join("  ".join(side(c, w) for side, c, w in zip(sides, line, widths, strict=True)).rstrip() for line in lines)


def table(result: Result) -> str:
    """Every case, and with several engines their ratios."""
    parts = [aligned(HEADER, rows(result))]
    quotients = ratio_rows(result)
    if quotients:
        parts.append("\nwithin each round, against the first engine:\n" + aligned(RATIO_HEADER, quotients, 3))
    return "\n".join(parts)
