"""The plots of a benchmark's page: SVG text, drawn by matplotlib, which is imported only here."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import Any

from ...runtime.errors import OutputError
from .result import NUMPY, Case, Result
from .statistics import NOISY, quantile

COLOURS = ("#0b6e99", "#d1495b", "#5b8c3a", "#8f5fbf", "#c98a1b")
GREY = "#4a4a4a"
STYLE = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "clapsep",  # the same plot has the same names inside
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
}
SWEEPS = ("queries", "batch", "threads", "callers")
WIDTH = 7.4  # inches
MOST_BARS = 60


def load_matplotlib() -> Any:
    """matplotlib's Figure, which needs no display.

    Raises:
        OutputError: matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise OutputError(f"a page needs matplotlib, which does not load ({error}); run: pip install 'clapsep-export[bench]'") from error
    return rc_context, Figure


def plots(result: Result) -> list[tuple[str, str]]:
    """Each plot's caption and SVG."""
    drawn = [
        ("Median of each case on a logarithmic scale, with p10 and p90.", _bars(result)),
        ("Sweeps: seconds of audio in a second of time, each observation a point, medians joined.", _sweeps(result)),
        (f"State of the machine: the reference product over the run. Dashed: its p10, and {NOISY:g} times that.", _reference(result)),
    ]
    return [(caption, svg) for caption, svg in drawn if svg]


def _svg(height: float, draw: Callable[[Any], None]) -> str:
    """What `draw` puts on a figure, without what only a file of its own needs."""
    rc_context, figure_class = load_matplotlib()
    with rc_context(STYLE):
        figure, out = figure_class(figsize=(WIDTH, height), layout="constrained"), io.StringIO()
        draw(figure)
        figure.savefig(out, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = out.getvalue()
    return re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg[svg.index("<svg") :])


def _engines(cases: Sequence[Case]) -> dict[str, str]:
    """A colour for each engine, grey for what runs in none."""
    names = list(dict.fromkeys(case.engine for case in cases if case.engine != NUMPY))
    grey = {NUMPY: GREY} if any(case.engine == NUMPY for case in cases) else {}
    return grey | {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}


def _bars(result: Result) -> str:
    labels = list(dict.fromkeys(case.label for case in result.cases if case.unit == "s"))[:MOST_BARS]
    cases = [case for case in result.cases if case.unit == "s" and case.label in labels]
    colours = _engines(cases)
    if not cases:
        return ""

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        step = 0.7 / len(colours)
        for i, (engine, colour) in enumerate(colours.items()):
            own = [case for case in cases if case.engine == engine]
            places = [labels.index(case.label) + (i - (len(colours) - 1) / 2) * step for case in own]
            p10, p50, p90 = ([1000 * quantile(case.observations, q) for case in own] for q in (0.1, 0.5, 0.9))
            errors = [[b - a for a, b in zip(p10, p50, strict=True)], [b - a for a, b in zip(p50, p90, strict=True)]]
            axes.errorbar(p50, places, xerr=errors, fmt="o", markersize=3.5, color=colour, elinewidth=1.5, label=engine)
        axes.set(xscale="log", xlabel="ms", yticks=range(len(labels)), yticklabels=labels, ylim=(len(labels) - 0.4, -0.6))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_minor_formatter(lambda *_: "")
        figure.legend(loc="outside upper center", ncols=len(colours), frameon=False)

    return _svg(0.9 + 0.2 * len(labels), draw)


def _sweeps(result: Result) -> str:
    found = {name: [case for case in result.cases if _swept(case, name)] for name in SWEEPS}
    found = {name: cases for name, cases in found.items() if len({case.parameters[name] for case in cases}) > 1}
    colours = _engines([case for cases in found.values() for case in cases])
    if not found:
        return ""

    def draw(figure: Any) -> None:
        for axes, (name, cases) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True):
            for engine, colour in colours.items():
                _line(axes, [case for case in cases if case.engine == engine], name, engine, colour)
            axes.set(xlabel=name, ylim=(0, None), xticks=sorted({case.parameters[name] for case in cases}))
        figure.supylabel("audio s/s")
        handles, names = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper center", ncols=len(colours), frameon=False)

    return _svg(2.8, draw)


def _swept(case: Case, name: str) -> bool:
    return isinstance(case.parameters.get(name), int) and case.unit == "s" and case.audio_seconds > 0 and case.name.startswith("separate")


def _line(axes: Any, cases: Sequence[Case], name: str, engine: str, colour: str) -> None:
    x = [case.parameters[name] for case in cases]
    axes.plot(x, [case.audio_seconds / quantile(case.observations, 0.5) for case in cases], color=colour, linewidth=1, label=engine)
    for place, case in zip(x, cases, strict=True):
        speeds = [case.audio_seconds / value for value in case.observations]
        axes.plot([place] * len(speeds), speeds, ".", color=colour, markersize=3, alpha=0.5)


def _reference(result: Result) -> str:
    at = [reading.at for reading in result.reference]
    seconds = [1000 * reading.seconds for reading in result.reference]

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        axes.plot(at, seconds, ".", markersize=3, color=COLOURS[0])
        for factor in (1, NOISY):
            axes.axhline(factor * quantile(seconds, 0.1), linestyle="--", linewidth=0.8, color=GREY)
        axes.set(xlabel="s since the run began", ylabel="ms", ylim=(0, 1.15 * quantile(seconds, 0.99)))

    return _svg(2.2, draw)
