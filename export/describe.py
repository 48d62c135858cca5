"""A bundle in words, for `clapsep-export inspect`."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from ..engines.engine import TensorSpec
from ..runtime.bundle import Bundle

ORIGINS = {
    "checkpoint": "from checkpoint files",
    "demo": "the demo model, trained on procedural sounds only",
    "generated": "generated, not trained: runs, does not separate",
}


def _tensors(specs: tuple[TensorSpec, ...]) -> str:
    return ", ".join(f"{s.name} {s.dtype} [{', '.join(map(str, s.shape))}]" for s in specs)


def describe(bundle: Bundle) -> str:
    """Family, origin, constants, graphs and the state of the gates: one text."""
    return "\n".join(_lines(bundle))


def _lines(bundle: Bundle) -> Iterator[str]:
    m = bundle.manifest
    yield f"{bundle.path}: {m.family} {m.variant}, {sum(f.size for f in m.files()) / 1e6:.1f} MB"
    yield f"weights    {ORIGINS.get(m.weights, m.weights)}"
    for source in m.sources:
        yield f"source     --{source.role} {source.name}, {source.size} bytes, sha256 {source.sha256[:16]}…"
    yield f"toolchain  {', '.join(f'{name} {v}' for name, v in m.toolchain.items())}"
    yield f"signal     {', '.join(f'{name} {v}' for name, v in m.dsp.items())}"
    yield f"condition  {', '.join(f'{name} {v}' for name, v in m.condition.items())}"
    if m.query:
        yield f"query      {', '.join(f'{name} {len(v) if isinstance(v, list) else v}' for name, v in m.query.items())}"
    if isinstance(labels := m.query.get("labels"), list):
        yield f"labels     {', '.join(label if str(label).isprintable() else repr(label) for label in map(str, labels))}"
    for name, g in m.graphs.items():
        weights = f", weights in {g.data.file} ({g.data.size / 1e6:.1f} MB)" if g.data else ""
        float32 = f" ({len(g.fp32_nodes)} in float32)" if g.fp32_nodes else ""
        yield f"graph      {name}: {g.precision}, opset {g.opset}, {g.nodes} nodes{float32}, {g.graph.size / 1e6:.1f} MB{weights}"
        yield f"           {_tensors(g.inputs)} → {_tensors(g.outputs)}"
    for plan in m.plans:
        yield f"plan       {plan.graph}: {plan.kind} {plan.precision}, {plan.plan.size / 1e6:.1f} MB, for {plan.target}"
    for engine in dict.fromkeys(g.engine for g in m.gates):
        gates = [g for g in m.gates if g.engine == engine]
        yield f"gates      {engine}: {sum(g.passed for g in gates)} of {len(gates)} passed"
    proven = {g.engine.split()[0] for g in m.gates}
    for kind in dict.fromkeys(plan.kind for plan in m.plans if plan.kind not in proven):
        command = f"clapsep-export verify {shlex.quote(str(bundle.path))} --engine {kind}"
        yield f"           the plans of {kind} could not be verified where they were compiled; run on the target: {command}"
