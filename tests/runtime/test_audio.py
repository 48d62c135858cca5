import logging
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import soundfile as sf
from clapsep.runtime.audio import (
    Audio,
    check_rate,
    check_samples,
    headroom_gain,
    new_file,
    output_format,
    read_audio,
    resample,
    to_mono,
    write_audio,
)
from clapsep.runtime.errors import AudioError, OutputError, OutputExists
from hypothesis import given, settings
from hypothesis import strategies as st


@pytest.mark.parametrize(
    ("name", "subtype"),
    [("a.wav", "PCM_16"), ("a.wav", "PCM_24"), ("a.wav", "FLOAT"), ("a.flac", "PCM_24"), ("a.ogg", "VORBIS")],
)
def test_reads_what_was_written_with_rate_channels_and_subtype(tmp_path, wav, name, subtype):
    audio = read_audio(wav(name, channels=2, rate=44100, subtype=subtype))
    assert audio.samples.shape == (2, 16000)
    assert audio.samples.dtype == np.float32
    assert (audio.sample_rate, audio.subtype) == (44100, subtype)
    assert output_format(tmp_path / name, audio) == (audio.format, subtype)


def test_formats_follow_the_extension_and_keep_the_word_length():
    like = Audio(np.zeros((1, 1), np.float32), 8000, "WAV", "PCM_24")
    from pathlib import Path

    assert output_format(Path("x.flac"), like) == ("FLAC", "PCM_24")
    assert output_format(Path("x.flac"), Audio(like.samples, 8000, "WAV", "FLOAT")) == ("FLAC", "PCM_24")
    assert output_format(Path("x.ogg"), like) == ("OGG", "VORBIS")
    assert output_format(Path("x.opus"), like) == ("OGG", "OPUS")
    assert output_format(Path("x.mp3"), like)[0] == "MP3"
    with pytest.raises(AudioError, match=r"x\.doc"):
        output_format(Path("x.doc"), like)


def test_unreadable_files_say_why(tmp_path):
    (tmp_path / "empty.wav").touch()
    (tmp_path / "text.wav").write_text("these are not samples")
    sf.write(tmp_path / "none.wav", np.zeros((0, 1)), 8000)
    sf.write(tmp_path / "nan.wav", np.array([0, np.nan, np.inf]), 8000, subtype="FLOAT")
    whole = tmp_path / "whole.flac"
    sf.write(whole, np.random.default_rng(0).uniform(-1, 1, 9000), 8000)
    (tmp_path / "header.flac").write_bytes(whole.read_bytes()[:30])
    for name, reason in {
        "missing.wav": "not a file",
        "empty.wav": "is empty",
        "text.wav": "cannot be read as audio",
        "none.wav": "no samples",
        "nan.wav": "2 NaN or infinite samples",
        "header.flac": "cannot be read as audio",
    }.items():
        with pytest.raises(AudioError, match=reason) as caught:
            read_audio(tmp_path / name)
        assert name in str(caught.value)


@pytest.mark.parametrize(
    ("samples", "reason"),
    [
        (np.zeros((2, 2, 2), np.float32), "3 axes"),
        (np.zeros(0, np.float32), "no samples"),
        (np.zeros((0, 5), np.float32), "no samples"),
        (np.zeros(5, np.uint8), "uint8"),
        (np.array(["a"]), "type"),
        (np.zeros(5, np.complex64), "complex"),
        (np.full(5, 1e300), "infinite"),
        (np.zeros((16000, 2), np.float32), "transpose"),
        ([[1.0, 2.0], [3.0]], "no array"),
        (None, "0 axes"),
    ],
)
def test_arrays_that_cannot_be_audio(samples, reason):
    with pytest.raises(AudioError, match=reason):
        check_samples(samples, "it")


@pytest.mark.parametrize("rate", [0, -1, 10**7, 44100.0, None, "8000"])
def test_rates_that_cannot_be(rate):
    with pytest.raises(AudioError, match="sample rate"):
        check_rate(rate, "it")
    assert check_rate(np.int64(8000), "it") == 8000


def test_integers_are_scaled_by_their_range():
    np.testing.assert_array_equal(check_samples(np.array([-32768, 16384], np.int16), "it"), [-1, 0.5])


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4000), st.sampled_from([8000, 11025, 16000, 32000, 44100, 48000, 96000, 192000]))
def test_resampling_there_and_back_keeps_the_length(length, rate):
    x = np.random.default_rng(length).uniform(-1, 1, length).astype(np.float32)
    there = resample(x, rate, 32000)
    assert len(there) == -(-length * 32000 // rate)
    assert len(resample(there, 32000, rate)) >= length


def test_headroom():
    assert headroom_gain(np.array([0.5, -1.0])) == 1
    assert headroom_gain(np.array([0.5, -3.0])) == pytest.approx(0.3)


def test_mono_is_the_mean_of_the_channels():
    np.testing.assert_array_equal(to_mono(np.array([[1, 2], [3, 4]], np.float32)), [2, 3])


def test_nothing_is_overwritten_without_consent(tmp_path):
    path, x = tmp_path / "a.wav", np.full((1, 5), 0.25, np.float32)
    path.write_bytes(b"precious")
    with pytest.raises(OutputExists, match="--force"):
        write_audio(path, x, 8000, "WAV", "FLOAT")
    assert path.read_bytes() == b"precious"
    write_audio(path, x, 8000, "WAV", "FLOAT", force=True)
    np.testing.assert_array_equal(read_audio(path).samples, x)
    assert os.listdir(tmp_path) == ["a.wav"]


def test_full_scale_is_kept_in_float_and_avoided_in_integers(tmp_path, caplog):
    x = np.array([[0.5, -2.0]], np.float32)
    write_audio(tmp_path / "f.wav", x, 8000, "WAV", "FLOAT")
    np.testing.assert_array_equal(read_audio(tmp_path / "f.wav").samples, x)
    with caplog.at_level(logging.WARNING):
        write_audio(tmp_path / "i.wav", x, 8000, "WAV", "PCM_16")
    assert "lowered by 6.02 dB" in caplog.text
    np.testing.assert_allclose(read_audio(tmp_path / "i.wav").samples, x / 2, atol=1e-4)


def test_a_file_made_meanwhile_is_not_replaced(tmp_path):
    path = tmp_path / "a.wav"
    with pytest.raises(OutputExists), new_file(path, force=False):
        path.write_bytes(b"theirs")
    assert path.read_bytes() == b"theirs"
    assert os.listdir(tmp_path) == ["a.wav"]


def test_names_that_are_not_unicode(tmp_path):
    path = tmp_path / os.fsdecode(b"caf\xe9.wav")
    sf.write(tmp_path / "x.wav", np.zeros(9), 8000)
    os.rename(tmp_path / "x.wav", path)
    assert read_audio(path).samples.shape == (1, 9)
    write_audio(path.with_name(os.fsdecode(b"\xe9.wav")), np.zeros((1, 9), np.float32), 8000, "WAV", "FLOAT")


def test_a_header_that_promises_too_much(tmp_path):
    """A FLAC whose STREAMINFO claims 2^36 - 1 samples."""
    sf.write(tmp_path / "a.flac", np.random.default_rng(0).uniform(-1, 1, 9000), 8000)
    content = bytearray((tmp_path / "a.flac").read_bytes())
    content[21] |= 0x0F
    content[22:26] = b"\xff\xff\xff\xff"
    (tmp_path / "a.flac").write_bytes(content)
    try:
        assert read_audio(tmp_path / "a.flac").samples.shape == (1, 9000)
    except AudioError:
        pass


def test_what_a_format_cannot_hold(tmp_path):
    with pytest.raises(OutputError, match=r"12 channels at 8000 Hz"):
        write_audio(tmp_path / "a.flac", np.zeros((12, 100), np.float32), 8000, "FLAC", "PCM_16")
    assert os.listdir(tmp_path) == []


def test_a_full_disk_leaves_nothing(small_disk):
    disk = small_disk(64)
    with pytest.raises(OutputError, match="No space left"):
        write_audio(disk / "a.wav", np.zeros((1, 100_000), np.float32), 8000, "WAV", "FLOAT")
    assert os.listdir(disk) == []


def test_a_read_only_place(small_disk):
    with pytest.raises(OutputError, match="Read-only"):
        write_audio(small_disk(64, ",ro") / "a.wav", np.zeros((1, 10), np.float32), 8000, "WAV", "FLOAT")


@pytest.mark.skipif(os.geteuid() == 0 and not shutil.which("setpriv"), reason="root may write everywhere unless setpriv says no")
def test_a_directory_without_permission(tmp_path):
    tmp_path.chmod(0o555)
    code = (
        "import sys, numpy; from pathlib import Path; from clapsep.runtime import errors, audio\n"
        "try: audio.write_audio(Path(sys.argv[1]) / 'a.wav', numpy.zeros((1, 9), 'f4'), 8000, 'WAV', 'FLOAT')\n"
        "except errors.OutputError as error: print(error)"
    )
    drop = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all"] if os.geteuid() == 0 else []
    done = subprocess.run([*drop, sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert "Permission denied" in done.stdout
    tmp_path.chmod(0o755)
    assert os.listdir(tmp_path) == []
