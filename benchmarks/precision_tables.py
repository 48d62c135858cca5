"""The markdown tables of benchmarks/precision.py."""

from __future__ import annotations

import math
from typing import Any

from clapsep.runtime.metrics import CEILING_DB

Row = dict[str, Any]


def shown(row: Row, *keys: str, digits: int = 1) -> str:
    """A number of a nested row, or a dash."""
    value: Any = row
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    if value is None:
        return "–"
    if not isinstance(value, float):
        return str(value)
    if not math.isfinite(value):
        return "not finite"
    return "exact" if value == CEILING_DB else f"{value:.{digits}f}"


def plan_cell(row: Row) -> str:
    plan = row.get("plan")
    if plan is None or "failed" in plan:
        return "–" if plan is None else f"no: {plan['failed'][:60]}"
    return f"{plan['layers']} layers, {plan['half_share']:.0%} half, {plan['seconds']:.1f} s, {plan['size'] / 1e6:.0f} MB"


def graph_table(rows: dict[str, Row], waves: bool) -> str:
    """One markdown row a way."""
    kind = "wave" if waves else "output"
    head = ["way", "nodes", "casts", "in float32", f"{kind} dB, ORT CPU", f"{kind} dB, strict", "hard signals, strict"]
    head += ["not finite", "largest / 65504", *(["mask dB, strict", "SDRi loss dB (worst scene)"] if waves else []), "plan (RTX, SM 8.6)"]
    lines = []
    for name, row in rows.items():
        if "failed" in row:
            lines.append([name, row["failed"][:120], *[""] * (len(head) - 2)])
            continue
        bad = f"invalid: {row['invalid'][:60]}" if "invalid" in row else row.get("strict", {}).get("failed")
        cells = [name, shown(row, "nodes"), shown(row, "casts"), shown(row, "strict", "float32_nodes")]
        cells += [row.get("ort", {}).get("failed", "")[:60] or shown(row, "ort", f"{kind}_db"), bad or shown(row, "strict", f"{kind}_db")]
        cells += [shown(row, "strict", f"hard_{kind}_db"), shown(row, "strict", "not_finite"), shown(row, "strict", "largest", digits=4)]
        if waves:
            cells += [shown(row, "strict", "output_db")]
            cells += [f"{row['sdri_loss']:.4f} ({row['sdri_worst_loss']:.3f})" if "sdri_loss" in row else "–"]
        lines.append([*cells, plan_cell(row)])
    return markdown(head, lines)


def engine_table(rows: dict[str, Row]) -> str:
    head = ["engine and precision", "mask dB", "wave dB", "hard signals, wave dB", "SDRi loss dB (worst scene)", "median ms"]
    head += ["time against ONNX Runtime float32", "against OpenVINO float32"]
    base = [rows.get(name, {}).get("median") for name in ("onnxruntime float32", "openvino float32")]
    lines = []
    for name, row in rows.items():
        if "failed" in row:
            lines.append([name, row["failed"], *[""] * (len(head) - 2)])
            continue
        loss = f"{row['sdri_loss']:.4f} ({row['sdri_worst_loss']:.3f})" if "sdri_loss" in row else "–"
        ratios = [f"{row['median'] / other:.2f}" if other else "–" for other in base]
        decibels = [shown(row, key) for key in ("output_db", "wave_db", "hard_wave_db")]
        lines.append([name, *decibels, loss, f"{1e3 * row['median']:.0f}", *ratios])
    return markdown(head, lines)


def markdown(head: list[str], lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cell.replace("|", "/") for cell in line) + " |" for line in [head, ["---"] * len(head), *lines])


def show(found: Row) -> None:
    for bundle, about in found["bundles"].items():
        for graph, rows in about["graphs"].items():
            print(f"\n{bundle}, {graph}\n\n{graph_table(rows, graph == 'separator')}")
            for name, row in rows.items():
                if row.get("inside", {}).get("nodes"):
                    print(f"  {name}: {row['inside']['sums not finite']} sums inside were not finite")
            for op, row in rows.get("ours", {}).get("reference", {}).items():
                worst = f"worst {row['ulp']:.3g} ulp, {row['relative']:.2g} of the largest"
                print(f"  against onnx.reference: {op}, {row['nodes']} nodes, {worst}")
        print(f"\n{bundle}, the separator on this CPU\n\n{engine_table(about['engines'])}")
