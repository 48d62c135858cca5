"""Compare a bundle's towers with the laion_clap package itself, which runs in a process and environment of its own."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

import numpy as np
from safetensors.torch import save_file

from ..runtime.bundle import Bundle
from ..runtime.errors import ClapsepError, InputError
from ..runtime.manifest import Gate
from ..runtime.metrics import cosine
from ..runtime.separator import Separator
from .checkpoint import DERIVED, read_checkpoint
from .gates import Progress, judge
from .golden import Golden, clips_of
from .hub import fetch

WORKER = Path(__file__).with_name("laion_clap_worker.py")


def compare(bundle: Bundle, clap: str, python: str, engine: str, progress: Progress) -> tuple[Gate, ...]:
    """Gates between the bundle's embeddings of golden.npz's captions and clips and laion_clap's.

    Raises:
        InputError: another CLAP checkpoint than the bundle was built from.
        ClapsepError: the other environment cannot run laion_clap.
    """
    progress("reading the CLAP checkpoint")
    checkpoint = read_checkpoint(fetch(clap), "clap")
    if checkpoint.source.sha256 not in {source.sha256 for source in bundle.manifest.sources}:
        raise InputError(f"--clap {checkpoint.source.name} is not the file that {bundle.path} was built from; give that one")
    golden = Golden.load(bundle.file(bundle.manifest.golden))
    progress("running laion_clap")
    with tempfile.TemporaryDirectory(prefix="clapsep-reference-") as scratch:
        weights, inputs, outputs = (Path(scratch) / name for name in ("clap.safetensors", "input.npz", "output.npz"))
        learned = {n.removeprefix("module."): t.contiguous() for n, t in checkpoint.tensors.items() if not DERIVED.search(n)}
        save_file(learned, weights)
        waves = {f"wave_{i}": wave for i, wave in enumerate(clips_of(golden))}
        np.savez(inputs, **golden.tokens, **waves)  # pyright: ignore[reportArgumentType]
        _run([python, "-P", str(WORKER), str(weights), str(inputs), str(outputs)])
        with np.load(outputs, allow_pickle=False) as data:
            theirs = {"text_encoder": data["text_embedding"], "audio_encoder": data["audio_embedding"]}
    separator = Separator(bundle, engine)
    rate = separator.queries.towers.front_end.sample_rate
    ours = {
        "text_encoder": separator.engine("text_encoder").run(golden.tokens)["embedding"],
        "audio_encoder": separator.encode_audio([(wave, rate) for wave in clips_of(golden)]),
    }
    worst = {name: float(np.max(1 - cosine(theirs[name], ours[name]))) for name in ours}
    return tuple(judge(f"{name} against laion_clap", "1 - cosine", value, "fp32", engine) for name, value in worst.items())


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise InputError(f"--reference-python {command[0]} cannot be started ({error.strerror}); give an interpreter") from error
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit code {done.returncode}"
        raise ClapsepError(f"laion_clap did not run in {command[0]}: {reason}")
