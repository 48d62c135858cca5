"""Fixtures: bundles built by the real command, and helpers that run it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
from hypothesis import settings

HERE = Path(__file__).parent
sys.path[:0] = [str(path) for path in (HERE, HERE.parent, HERE.parent / "benchmarks")]  # helpers, training, scripts

# CI judges the change, not the luck of the draw; runs by hand go on searching.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")

Run = Callable[..., subprocess.CompletedProcess[str]]
COMMANDS = {"clapsep": "clapsep.runtime", "clapsep-export": "clapsep.export"}


@pytest.fixture(scope="session")
def run() -> Run:
    """Run `clapsep` or `clapsep-export` as a subprocess and check its exit code; no traceback may ever be seen."""

    def call(command: str, *args: object, code: int = 0, **kwargs: object) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-m", COMMANDS[command], *map(str, args)]
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=600, **kwargs)  # type: ignore[arg-type]
        assert done.returncode == code, f"exit {done.returncode}: {done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr
        return done

    return call


@pytest.fixture
def start():
    """Start a command whose stderr is read; unlike a child of a shell's background job it listens to SIGINT."""

    def listen() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    def call(command: str, *args: object) -> subprocess.Popen[str]:
        words = [sys.executable, "-m", COMMANDS[command], *map(str, args)]
        return subprocess.Popen(words, stderr=subprocess.PIPE, text=True, preexec_fn=listen)

    return call


@pytest.fixture(scope="session")
def demo_bundle(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo bundle, built once by the real command; tests must not change it."""
    out = tmp_path_factory.mktemp("demo") / "demo.clapsep"
    run("clapsep-export", "build", out, "--demo")
    return out


@pytest.fixture(scope="session")
def separator(demo_bundle: Path):
    from clapsep.runtime import Separator

    return Separator(demo_bundle)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(5)


@pytest.fixture
def wav(tmp_path: Path) -> Callable[..., Path]:
    """Write a file of noise and return its path."""

    def write(name: str = "mix.wav", n: int = 16000, rate: int = 32000, channels: int = 1, **kwargs: object) -> Path:
        samples = np.random.default_rng(1).uniform(-0.5, 0.5, (n, channels))
        sf.write(tmp_path / name, samples, rate, **kwargs)  # type: ignore[arg-type]
        return tmp_path / name

    return write


@pytest.fixture
def small_disk(tmp_path: Path):
    """A tmpfs of a given size in kB, mounted for the test."""
    mounted: list[Path] = []

    def mount(size: int, options: str = "") -> Path:
        place = tmp_path / f"disk{len(mounted)}"
        place.mkdir()
        words = ["mount", "-t", "tmpfs", "-o", f"size={size}k{options}", "tmpfs", str(place)]
        if os.geteuid() != 0 or subprocess.run(words, capture_output=True, check=False).returncode:
            pytest.skip("mounting a small file system needs root")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", "-l", str(place)], check=True)
