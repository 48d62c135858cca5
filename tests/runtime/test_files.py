import os
import subprocess
import sys

import numpy as np
import pytest
import soundfile as sf
from clapsep.runtime.audiofile import read_audio
from clapsep.runtime.errors import AudioError, InputError, OutputExists
from clapsep.runtime.files import separate_file

PEAK = """
import sys
from pathlib import Path
from clapsep.runtime import Separator
from clapsep.runtime.files import separate_file
separator = Separator(sys.argv[1], threads=1)
separate_file(separator, sys.argv[2], [Path(sys.argv[3])], [separator.condition("rain")])
print(next(int(line.split()[1]) / 1024 for line in open('/proc/self/status') if line.startswith('VmHWM')))
"""


@pytest.fixture
def conditions(separator):
    return [separator.condition("rain"), separator.condition("a siren", "rain")]


@pytest.mark.parametrize(("rate", "n"), [(32000, 200_001), (44100, 1), (8000, 70_000)])
def test_files_hold_what_the_array_gives(separator, conditions, wav, tmp_path, rate, n):
    source, told = wav("a.wav", n=n, rate=rate, channels=2, subtype="FLOAT"), []
    outputs = [tmp_path / "rain.wav", tmp_path / "siren.flac"]
    result = separate_file(separator, source, outputs, conditions, progress=told.append)
    wanted = separator.separate_many(read_audio(source)[0], rate, conditions)
    np.testing.assert_array_equal(read_audio(outputs[0])[0], wanted[0])
    np.testing.assert_allclose(read_audio(outputs[1])[0], wanted[1], atol=1e-6)
    assert result.seconds == pytest.approx(n / rate)
    assert sum(told) == pytest.approx(n / rate)
    assert (result.rtf, result.notes) == (result.took / result.seconds, ())


def test_a_peak_above_1_is_kept_in_float_and_lowered_in_integers(separator, conditions, tmp_path):
    x = np.random.default_rng(0).uniform(-9, 9, 90_000).astype(np.float32)
    sf.write(tmp_path / "a.wav", x, 32000, subtype="FLOAT")
    outputs = [tmp_path / "f.wav", tmp_path / "i.flac"]
    result = separate_file(separator, tmp_path / "a.wav", outputs, [conditions[0]] * 2)
    whole, lowered = (read_audio(path)[0][0] for path in outputs)
    np.testing.assert_array_equal(whole, separator.separate(x, 32000, condition=conditions[0]))
    peak = np.abs(whole).max()
    assert peak > 1
    np.testing.assert_allclose(lowered, whole / peak, atol=1e-6)
    assert result.notes == (f"{outputs[1]}: lowered by {20 * np.log10(peak):.2f} dB",)


def test_calls_that_cannot_be(separator, conditions, wav, tmp_path):
    source = wav("a.wav")
    before = source.read_bytes()
    with pytest.raises(InputError, match="would be overwritten by its result"):
        separate_file(separator, source, [tmp_path / "x" / ".." / "a.wav"], conditions[:1], force=True)
    for outputs in ([tmp_path / "b.wav"], [tmp_path / "b.wav"] * 2):
        with pytest.raises(InputError, match="an output of its own"):
            separate_file(separator, source, outputs, conditions)
    with pytest.raises(AudioError, match="no path"):
        separate_file(separator, 3, [tmp_path / "b.wav"], conditions[:1])
    assert os.listdir(tmp_path) == ["a.wav"]
    assert source.read_bytes() == before
    separate_file(separator, str(source), [str(tmp_path / "b.wav")], ["rain"])
    assert sf.info(tmp_path / "b.wav").frames == 16000


def test_what_publishing_raises_discards_everything(separator, conditions, wav, tmp_path):
    told = []

    def refuse(files):
        told.extend(files.items())
        raise AudioError("nobody wants it")

    with pytest.raises(AudioError, match="nobody"):
        separate_file(separator, wav("a.wav"), [tmp_path / "b.wav", tmp_path / "c.wav"], conditions, publish=refuse)
    assert os.listdir(tmp_path) == ["a.wav"]
    separate_file(separator, tmp_path / "a.wav", [tmp_path / "b.wav"], conditions[:1], publish=lambda files: told.extend(files.items()))
    path, (size, when) = told[-1]
    assert (path.name, size, when) == ("b.wav", path.stat().st_size, path.stat().st_mtime_ns)


def test_all_outputs_or_none(separator, conditions, wav, tmp_path):
    source = wav("a.wav")
    (tmp_path / "b.wav").write_bytes(b"precious")
    with pytest.raises(OutputExists):
        separate_file(separator, source, [tmp_path / "c.wav", tmp_path / "b.wav"], conditions)
    with pytest.raises(AudioError, match="no known audio extension"):
        separate_file(separator, source, [tmp_path / "c.wav", tmp_path / "d.doc"], conditions)
    assert sorted(os.listdir(tmp_path)) == ["a.wav", "b.wav"]
    assert (tmp_path / "b.wav").read_bytes() == b"precious"


def test_a_long_file_needs_no_more_memory_than_a_short_one(demo_bundle, wav, tmp_path):
    peaks = []
    for seconds in (20, 320):
        source = wav(f"{seconds}.wav", n=32000 * seconds, subtype="PCM_16")
        words = [sys.executable, "-c", PEAK, str(demo_bundle), str(source), str(tmp_path / f"{seconds}.out.flac")]
        peaks.append(float(subprocess.run(words, capture_output=True, text=True, check=True).stdout))
    assert peaks[1] < peaks[0] + 10  # MB; the samples alone are 38 MB more
