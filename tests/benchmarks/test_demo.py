"""`make demo`'s script, on the bundle that it would build."""

import subprocess
import sys
from pathlib import Path

import soundfile as sf
from clapsep.runtime.metrics import snr_improvement

ROOT = Path(__file__).parents[2]


def test_the_demo_extracts_each_source_in_turn(demo_bundle, tmp_path):
    (tmp_path / "demo.clapsep").symlink_to(demo_bundle)
    done = subprocess.run([sys.executable, ROOT / "benchmarks" / "demo.py", tmp_path], capture_output=True, text=True, check=True)
    assert done.stdout.count("SDR improvement") == 2
    read = lambda path: sf.read(path, dtype="float32")[0]  # noqa: E731
    mixture = read(tmp_path / "mixture.wav")
    truth = {name: read(ROOT / "benchmarks" / "examples" / f"{name}.flac") for name in ("siren", "speech")}
    for wanted, other in (("siren", "speech"), ("speech", "siren")):
        found = read(tmp_path / f"{wanted}-extracted.wav")
        assert snr_improvement(truth[wanted], found, mixture) > 3
        assert snr_improvement(truth[other], found, mixture) < snr_improvement(truth[wanted], found, mixture) - 3
    assert (tmp_path / "demo.png").stat().st_size > 10_000
