"""A benchmark as one HTML page that needs nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from .plots import plots
from .result import Result
from .statistics import FEWEST, NOISY, warnings
from .table import HEADER, RATIO_HEADER, Row, number, quantity, ratio_rows, rows

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.45 system-ui, sans-serif; color: #1c1c1c; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: 0.2rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; font-size: 0.82rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.15rem 0.6rem 0.15rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid #e4e4e4; }
td.number, th.number { text-align: right; white-space: nowrap; }
tr.doubtful td { color: #8a8a8a; }
.warning { border-left: 4px solid #d1495b; background: #fdf0f1; padding: 0.5rem 0.8rem; margin: 0.6rem 0; }
code { font-size: 0.85em; overflow-wrap: anywhere; } figure { margin: 1rem 0; } figcaption { font-size: 0.82rem; color: #555; }
svg { max-width: 100%; height: auto; }
@media print { body { max-width: none; margin: 0; font-size: 10pt; } tr, figure { break-inside: avoid; } }
"""
RULE = (
    "A figure may be quoted, with machine, versions and settings, if its last column is empty and no warning calls the run too noisy. "
    f"few: fewer than {FEWEST} observations. spread: p90/p10 of its observations is above {NOISY:g}. machine: while it was measured, "
    f"the reference product spread by more than {NOISY:g} or took more than {NOISY:g} times as long as at its best (p10) in this run. "
    "A quantile needs an observation beyond it: p90 ten, p99 a hundred. audio s/s is seconds of audio in a second (K targets of one "
    "mixture count K times), RTF its inverse."
)


def page(result: Result) -> str:
    """The page. Every text from the result is escaped.

    Raises:
        OutputError: matplotlib is not installed.
    """
    title = f"Benchmark of {result.bundle.name}"
    parts = [f"<h1>{escape(title)}</h1>", f"<p>{escape(result.taken)}</p>"]
    parts += [f'<p class="warning">{escape(warning)}</p>' for warning in warnings(result)]
    parts += ["<h2>On what</h2>", _table(("", ""), _facts(result), 2)]
    parts += ["<h2>Cases</h2>", _table(HEADER, rows(result), 2), f"<p>{escape(RULE)}</p>"]
    quotients = ratio_rows(result)
    if quotients:
        parts += ["<h2>Within each round, against the first engine</h2>", _table(RATIO_HEADER, quotients, 3)]
    parts += ["<h2>Plots</h2>", *(_figure(*plot) for plot in plots(result))]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title><style>{STYLE}</style>'
    body = "\n".join(parts)
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def _figure(caption: str, svg: str) -> str:
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def _facts(result: Result) -> list[Row]:
    e, b = result.environment, result.bundle
    return [
        ("command", result.command),
        ("bundle", f"{b.name}, {b.family}, {b.precision}, weights {b.weights}, manifest SHA-256 {b.sha256}"),
        ("processor", f"{e.cpu.model}, {e.cpu.cores} cores, {e.cpu.usable} threads, governor {e.cpu.governor}, quota {e.cpu.quota}"),
        ("memory", quantity(e.memory, "bytes")),
        ("GPU", f"{', '.join(e.gpus) or 'none'} ({e.driver})"),
        ("system", f"{e.platform}, {e.python}, BLAS {e.blas}, load {e.load:g} at the start"),
        ("other programs", f"{number(result.elsewhere)} cores busy on average"),
        ("packages", _pairs(e.packages)),
        ("variables", _pairs(e.variables) or "none of those that set threads or choose a GPU"),
        ("settings", _pairs(result.settings)),
        ("instructions", " ".join(e.cpu.flags)),
        *(("note", note) for note in result.notes),
    ]


def _pairs(values: dict[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _table(header: Row, rows: Sequence[Row], left: int) -> str:
    """The first `left` columns and the last are words; a row whose last cell says something is dimmed where the header has one for it."""
    last, doubts = len(header) - 1, header[-1] == HEADER[-1]
    kinds = ["" if i < left or (i == last and doubts) else ' class="number"' for i in range(len(header))]
    lines = ["<tr>" + "".join(f"<th{k}>{escape(c)}</th>" for k, c in zip(kinds, header, strict=True)) + "</tr>"] if any(header) else []
    for row in rows:
        dim = ' class="doubtful"' if doubts and row[-1] else ""
        lines.append(f"<tr{dim}>" + "".join(f"<td{k}>{escape(c)}</td>" for k, c in zip(kinds, row, strict=True)) + "</tr>")
    return f"<table>{''.join(lines)}</table>"
