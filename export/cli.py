"""The `clapsep-export` command. torch is imported only by the commands that need it."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import click

from .. import __version__
from ..engines import KINDS, PlanSettings
from ..engines.plan import Compatibility
from ..runtime.bundle import Bundle
from ..runtime.commands import Command, debug_option, device_option, precision_option
from ..runtime.errors import InputError
from ..runtime.family import family_class, family_names
from .bench import GROUPS

PATH = click.Path(path_type=Path)


@click.group(cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
@debug_option
def main() -> None:
    """Turn a separation checkpoint into a verified bundle, and look after bundles."""


class Stages:
    """Progress on stderr: each stage when it begins, with the time since the start and the peak memory so far."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    def __call__(self, stage: str) -> None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        click.echo(f"{time.monotonic() - self._start:7.1f} s  {peak:5.2f} GiB  {stage}", err=True)


capability_option = click.option(
    "--compute-capability",
    "compute_capabilities",
    metavar="X.Y",
    multiple=True,
    help="GPUs to compile tensorrt-rtx plans for, such as 8.9; needs no GPU.  [default: the one in this machine]",
)


@main.command()
@click.argument("out", metavar="OUT.clapsep", type=PATH)
@click.option("--clap", metavar="FILE", help="CLAP checkpoint (path or hf://owner/repo/path).")
@click.option("--checkpoint", metavar="FILE", help="Separation checkpoint: published, raw training, or safetensors (path or hf://…).")
@click.option("--family", metavar="NAME", help="What the checkpoint is; see `clapsep-export families`.  [default: recognised]")
@click.option(
    "--tokenizer",
    metavar="DIR|FILE",
    help="RoBERTa's tokenizer.json, or vocab.json and merges.txt.  [default: from the hub]",
)
@click.option("--demo", is_flag=True, help="The small model that comes with this package, in place of the checkpoints.")
@click.option(
    "--precision",
    type=click.Choice(["fp32", "fp16"]),
    default="fp32",
    show_default=True,
    help="Of the graphs; inputs and outputs stay fp32.",
)
@click.option(
    "--engine",
    "engines",
    type=click.Choice(KINDS),
    multiple=True,
    default=["onnxruntime"],
    show_default=True,
    help="Gates run on these; kinds that need plans are compiled first.",
)
@click.option(
    "--max-batch",
    type=click.IntRange(1, 256),
    default=4,
    show_default=True,
    help="Largest batch that plans are made for.",
)
@capability_option
@click.option("--force", is_flag=True, help="Replace an existing bundle.")
@debug_option
def build(
    out: Path,
    clap: str | None,
    checkpoint: str | None,
    family: str | None,
    tokenizer: str | None,
    demo: bool,
    precision: str,
    engines: tuple[str, ...],
    max_batch: int,
    compute_capabilities: tuple[str, ...],
    force: bool,
) -> None:
    """Export checkpoints to a bundle and prove that nothing was lost."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded: its threads spin, which starves every neighbour
    from .build import Request
    from .build import build as run
    from .describe import ORIGINS
    from .gates import table

    request = Request(clap, checkpoint, tokenizer, demo, family, precision, engines, max_batch, compute_capabilities, force)
    manifest = run(out, request, Stages())
    click.echo(table(manifest.gates))
    click.echo(f"weights: {ORIGINS[manifest.weights]}", err=True)
    click.echo(out)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print the same as JSON.")
@debug_option
def families(as_json: bool) -> None:
    """List the model families: what each is built from, what it can be asked, and what it costs."""
    facts = {name: dataclasses.asdict(family_class(name).facts) for name in family_names()}
    if as_json:
        click.echo(json.dumps(facts, indent=1))
        return
    for name, fact in facts.items():
        click.echo(f"{name}: {fact.pop('title')}")
        for field, text in fact.items():
            click.echo(f"  {field.replace('_', ' '):<12} {text}{' Hz' if field == 'sample_rate' else ''}")


@main.command("compile")
@click.argument("bundle", type=PATH)
@click.option("--engine", type=click.Choice(KINDS), required=True)
@click.option("--precision", type=click.Choice(["fp32", "fp16", "bf16"]), help="What the plans compute in.  [default: the graphs' own]")
@capability_option
@click.option(
    "--compatibility",
    type=click.Choice(["none", "ampere-plus", "same-compute-capability"]),
    default="none",
    show_default=True,
    help="Other GPUs that tensorrt plans must run on.",
)
@click.option("--version-compatible", is_flag=True, help="Let later TensorRT libraries of the same major version run the plans.")
@click.option("--workspace", metavar="MIB", type=click.IntRange(1), help="GPU scratch memory that the plans may use.")
@click.option("--memory", metavar="MIB", type=click.IntRange(1), help="Host memory that the compiler may use.")
@click.option("--timing-cache", metavar="FILE", type=PATH, help="Where tensorrt keeps its measurements for the next compilation.")
@click.option("--force", is_flag=True, help="Compile again what is there already.")
@debug_option
def compile_(
    bundle: Path,
    engine: str,
    precision: str | None,
    compute_capabilities: tuple[str, ...],
    compatibility: Compatibility,
    version_compatible: bool,
    workspace: int | None,
    memory: int | None,
    timing_cache: Path | None,
    force: bool,
) -> None:
    """Add plans to a bundle, for this machine or for named GPUs, and prove them where they can run. Needs no torch."""
    from .compile import compile_bundle
    from .gates import table

    scratch, host = (None if size is None else size << 20 for size in (workspace, memory))
    settings = PlanSettings(precision or "", 1, compute_capabilities, compatibility, version_compatible, scratch, host, timing_cache)
    compiled = compile_bundle(bundle, engine, settings, Stages(), force=force)
    if compiled.gates:
        click.echo(table(compiled.gates))
    for plan in compiled.plans:
        click.echo(f"{plan.plan.file}  {plan.plan.size / 2**20:.1f} MiB  {plan.target}")
    if compiled.unverified:
        click.echo(f"not verified here; run on the target: clapsep-export verify {shlex.quote(str(bundle))} --engine {engine}", err=True)


@main.command()
@click.argument("bundle", type=PATH)
@click.option("--engine", "engines", type=click.Choice(KINDS), multiple=True, default=["onnxruntime"], show_default=True)
@device_option
@precision_option
@click.option("--reference", type=click.Choice(["laion_clap"]), help="Also compare the towers with this package's own.")
@click.option(
    "--reference-python",
    metavar="PYTHON",
    default="python3",
    show_default=True,
    help="Interpreter that has the package.",
)
@click.option("--clap", metavar="FILE", help="The CLAP checkpoint the bundle was built from, for --reference.")
@click.option("--json", "as_json", is_flag=True, help="Print the gates as JSON.")
@debug_option
def verify(
    bundle: Path,
    engines: tuple[str, ...],
    device: str | None,
    precision: str | None,
    reference: str | None,
    reference_python: str,
    clap: str | None,
    as_json: bool,
) -> None:
    """Check a bundle's files and run its gates again on this machine."""
    from .gates import measure, require, table

    if reference and clap is None:
        raise InputError("--reference laion_clap needs the CLAP checkpoint that the bundle was built from; give it with --clap")
    stages = Stages()
    gates = measure(bundle, engines, stages, device, precision)
    if reference and clap:
        from .reference import compare

        gates += compare(Bundle.open(bundle), clap, reference_python, engines[0], stages)
    click.echo(json.dumps([dataclasses.asdict(g) for g in gates], indent=1) if as_json else table(gates))
    require(gates, str(bundle), "do not use it on this machine")


@main.command()
@click.argument("bundle", type=PATH)
@click.option("--json", "as_json", is_flag=True, help="Print the whole manifest.")
@debug_option
def inspect(bundle: Path, as_json: bool) -> None:
    """Say what a bundle is, without any engine."""
    opened = Bundle.open(bundle)
    if as_json:
        click.echo(opened.manifest.to_json(), nl=False)
        return
    from .describe import describe

    click.echo(describe(opened))


@main.command()
@click.option("--engine", "engines", type=click.Choice(KINDS), multiple=True, help="Only these kinds, all of which must run.")
@click.option("--json", "as_json", is_flag=True, help="Print the whole report as JSON.")
@debug_option
@click.pass_context
def doctor(ctx: click.Context, engines: tuple[str, ...], as_json: bool) -> None:
    """Try every engine kind on this machine, and say how to repair what cannot run."""
    from ..engines.doctor import describe, examine

    report = examine(engines)
    click.echo(report.to_json() if as_json else describe(report))
    if not report.runs(engines):
        ctx.exit(1)


@main.command()
@click.argument("bundle", type=PATH, required=False)
@click.option(
    "--engine",
    "engines",
    metavar="KIND",
    multiple=True,
    help="onnxruntime (default), openvino:bf16, onnxruntime:cuda, …; several take turns.",
)
@device_option
@precision_option
@click.option("--seconds", type=click.FloatRange(0, 3600), default=1.0, show_default=True, help="Time for each case with each engine.")
@click.option("--quick", is_flag=True, help="Two rounds and a long file of 10 s: shows that all runs; nothing to quote.")
@click.option("--only", type=click.Choice(GROUPS), multiple=True, help="Only these groups of cases.  [default: all]")
@click.option("--queries", metavar="K", type=click.IntRange(1, 256), multiple=True, help="Numbers of queries.  [default: 1 2 4 8]")
@click.option("--batch", "batches", metavar="N", type=click.IntRange(1, 256), multiple=True, help="Windows per call.  [default: 1 2 4]")
@click.option("--threads", metavar="N", type=click.IntRange(1, 1024), multiple=True, help="Engine threads.  [default: 1 2 4 … cores]")
@click.option("--callers", metavar="N", type=click.IntRange(1, 256), multiple=True, help="Threads with one separator.  [default: 1 2 4]")
@click.option("--json", "json_out", metavar="FILE", type=PATH, help="Write every observation here.")
@click.option("--html", "html_out", metavar="FILE", type=PATH, help="Write a page with plots here; needs matplotlib.")
@click.option("--from", "source", metavar="OLD.json", type=PATH, help="Show an earlier benchmark in place of a new one.")
@click.option("--compare", "old", metavar="OLD.json", type=PATH, help="Print ratios to an earlier benchmark; exit 1 if any case got worse.")
@click.option("--margin", type=click.FloatRange(1, 1000), default=1.15, show_default=True, help="Ratio beyond which a case got worse.")
@click.option("--force", is_flag=True, help="Replace existing files.")
@debug_option
def bench(**given: Any) -> None:
    """Measure a bundle on this machine: every stage, queries, routes, sweeps, cold start and memory."""
    from .bench.command import Request, run

    run(Request(**given), shlex.join(["clapsep-export", *sys.argv[1:]]), Stages())
