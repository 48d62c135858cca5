import logging
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
from clapsep.runtime import audiofile
from clapsep.runtime.audiofile import AudioFile, Limits, new_audio, output_format, read_audio, scan
from clapsep.runtime.errors import AudioError, LimitError, OutputError


def write(path, samples, kind="WAV", subtype="FLOAT", force=False):
    with new_audio(path, 8000, len(samples), kind, subtype, force=force) as sink:
        for piece in np.array_split(samples, 3, axis=1):
            sink.write(piece)
        sink.encode()


@pytest.mark.parametrize(
    ("name", "subtype"),
    [("a.wav", "PCM_16"), ("a.wav", "PCM_24"), ("a.wav", "FLOAT"), ("a.flac", "PCM_24"), ("a.ogg", "VORBIS")],
)
def test_reads_what_was_written_with_rate_channels_and_subtype(tmp_path, wav, name, subtype):
    path = wav(name, channels=2, rate=44100, subtype=subtype)
    samples, rate = read_audio(path)
    assert (samples.shape, samples.dtype, rate) == ((2, 16000), np.float32, 44100)
    audio = scan(path)
    assert (audio.frames, audio.channels, audio.sample_rate, audio.subtype) == (16000, 2, 44100, subtype)
    assert audio.peak == np.abs(samples).max()
    np.testing.assert_array_equal(np.concatenate(list(audio.blocks()), axis=1), samples)
    assert output_format(tmp_path / name, audio) == (audio.format, subtype)


def test_formats_follow_the_extension_and_keep_the_word_length():
    like = AudioFile(Path("x.wav"), 1, 1, 8000, "WAV", "PCM_24", 1.0, ())
    extensible = replace(like, format="WAVEX", subtype="FLOAT")
    assert output_format(Path("x.flac"), like) == ("FLAC", "PCM_24")
    assert output_format(Path("x.flac"), replace(like, subtype="FLOAT")) == ("FLAC", "PCM_24")
    assert output_format(Path("x.wav"), extensible) == ("WAV", "FLOAT")
    assert output_format(Path("x.wav"), replace(like, frames=1 << 31)) == ("RF64", "PCM_24")
    for name, format in (("x.aiff", "WAV"), ("x.wav", "AIFF"), ("x.wav", "CAF")):
        assert output_format(Path(name), replace(like, subtype="FLOAT", format=format))[1] == "FLOAT"
    with pytest.raises(OutputError, match="larger than AIFF can be"):
        output_format(Path("x.aiff"), replace(like, frames=1 << 31))
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
        with pytest.raises(AudioError, match=reason):
            scan(tmp_path / name)


def test_full_scale_is_kept_in_float_and_avoided_in_integers(tmp_path, caplog):
    x = np.array([[0.5, -2.0]], np.float32)
    write(tmp_path / "f.wav", x, "WAV", "FLOAT")
    np.testing.assert_array_equal(read_audio(tmp_path / "f.wav")[0], x)
    with caplog.at_level(logging.WARNING):
        write(tmp_path / "i.wav", x, "WAV", "PCM_16")
    assert "lowered by 6.02 dB" in caplog.text
    np.testing.assert_allclose(read_audio(tmp_path / "i.wav")[0], x / 2, atol=1e-4)


def test_names_that_are_not_unicode(tmp_path):
    path = tmp_path / os.fsdecode(b"caf\xe9.wav")
    sf.write(tmp_path / "x.wav", np.zeros(9), 8000)
    os.rename(tmp_path / "x.wav", path)
    assert read_audio(path)[0].shape == (1, 9)
    write(path.with_name(os.fsdecode(b"\xe9.wav")), np.zeros((1, 9), np.float32), "WAV", "FLOAT")


def test_a_header_that_promises_too_much(tmp_path):
    """A FLAC whose STREAMINFO claims 2^36 - 1 samples."""
    sf.write(tmp_path / "a.flac", np.random.default_rng(0).uniform(-1, 1, 9000), 8000)
    content = bytearray((tmp_path / "a.flac").read_bytes())
    content[21] |= 0x0F
    content[22:26] = b"\xff\xff\xff\xff"
    (tmp_path / "a.flac").write_bytes(content)
    try:
        assert read_audio(tmp_path / "a.flac")[0].shape == (1, 9000)
    except AudioError:
        pass


def test_what_a_format_cannot_hold(tmp_path):
    with pytest.raises(OutputError, match=r"12 channels at 8000 Hz"):
        write(tmp_path / "a.flac", np.zeros((12, 100), np.float32), "FLAC", "PCM_16")
    assert os.listdir(tmp_path) == []


def test_a_full_disk_leaves_nothing(small_disk):
    disk = small_disk(64)
    with pytest.raises(OutputError, match="No space left"):
        write(disk / "a.wav", np.zeros((1, 100_000), np.float32), "WAV", "FLOAT")
    assert os.listdir(disk) == []


def test_a_read_only_place(small_disk):
    with pytest.raises(OutputError, match="Read-only"):
        write(small_disk(64, ",ro") / "a.wav", np.zeros((1, 10), np.float32), "WAV", "FLOAT")


@pytest.mark.skipif(os.geteuid() == 0 and not shutil.which("setpriv"), reason="root may write everywhere unless setpriv says no")
def test_a_directory_without_permission(tmp_path):
    tmp_path.chmod(0o555)
    code = (
        "import sys; from pathlib import Path; from clapsep.runtime import errors, outputs\n"
        "try:\n with outputs.new_file(Path(sys.argv[1]) / 'a.wav'): print('opened')\n"
        "except errors.OutputError as error: print(error)"
    )
    drop = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all"] if os.geteuid() == 0 else []
    done = subprocess.run([*drop, sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert "Permission denied" in done.stdout
    tmp_path.chmod(0o755)
    assert os.listdir(tmp_path) == []


def test_limits(tmp_path, wav):
    path = wav(n=16000, rate=8000, channels=3)
    for limits, flag in ((Limits(bytes=99), "--max-bytes"), (Limits(channels=2), "--max-channels"), (Limits(seconds=1.9), "--max-seconds")):
        with pytest.raises(LimitError, match=flag):
            scan(path, limits)
    with pytest.raises(LimitError, match="47999 samples"):
        read_audio(path, Limits(samples=47999))
    with pytest.raises(LimitError, match="1.9 s"):
        read_audio(path, Limits(example_seconds=1.9))
    assert scan(path, Limits(bytes=path.stat().st_size, channels=3, seconds=2.0)).seconds == 2
    assert read_audio(path, Limits(samples=48000))[1] == 8000


@pytest.mark.parametrize("name", ["a.wav", "a.aiff", "a.flac"])
def test_a_file_that_ends_early_is_noticed(tmp_path, wav, name):
    whole = wav(name)
    assert scan(whole).complaint == ""
    cut = tmp_path / f"cut-{name}"
    cut.write_bytes(whole.read_bytes()[:20_000])
    try:
        found = scan(cut)
    except AudioError:
        assert name == "a.flac"
    else:
        assert f"cut-{name} ends early" in found.complaint
        assert 0 < found.frames < 16000


def test_a_header_written_to_a_pipe_is_no_complaint(tmp_path, wav):
    content = bytearray(wav().read_bytes())
    content[4:8] = content[40:44] = b"\xff\xff\xff\xff"
    (tmp_path / "piped.wav").write_bytes(content)
    assert scan(tmp_path / "piped.wav").complaint == ""


@pytest.mark.parametrize(("n", "rate"), [(100, 32000), (9000, 32000), (20_000, 32000), (9000, 16000)])
def test_a_file_that_changes_between_its_two_readings(wav, n, rate):
    found = scan(wav(n=9000))
    sf.write(found.path, np.zeros(n), rate)
    with pytest.raises(AudioError, match="was changed while it was read"):
        list(found.blocks())


@pytest.mark.parametrize(("name", "kind", "subtype"), [("a.flac", "FLAC", "PCM_16"), ("a.ogg", "OGG", "VORBIS"), ("a.opus", "OGG", "OPUS"),
                                                       ("a.mp3", "MP3", "MPEG_LAYER_III"), ("a.wav", "WAV", "PCM_16")])  # fmt: skip
def test_a_disk_that_fills_while_the_encoder_closes(small_disk, name, kind, subtype):
    """With every size of disk from too small for the samples to large enough: a whole file or none."""
    samples, outcomes = np.random.default_rng(0).uniform(-0.5, 0.5, (1, 12_000)).astype(np.float32), set()
    for size in range(48, 160, 4):
        disk, error = small_disk(size), None
        try:
            with new_audio(disk / name, 8000, 1, kind, subtype) as sink:
                sink.write(samples)
                sink.encode()
        except OutputError as caught:
            error = caught
        if error is None:
            assert scan(disk / name).frames >= 12_000
        else:
            assert "No space left" in str(error)
            assert os.listdir(disk) == []
        outcomes.add(error is None)
    assert outcomes == {False, True}


def test_an_output_whose_making_fails_vanishes(tmp_path):
    def fail():
        with new_audio(tmp_path / "a.wav", 8000, 1, "WAV", "FLOAT") as sink:
            sink.write(np.ones((1, 5), np.float32))
            raise AudioError("no more")

    with pytest.raises(AudioError):
        fail()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_within_libsndfile_comes_afterwards_and_is_not_lost(tmp_path, monkeypatch, number):
    """Python would print and forget what a handler raises within a callback."""

    def stop(number, frame):
        raise KeyboardInterrupt

    monkeypatch.setattr(audiofile._Target, "tell", lambda self: signal.raise_signal(number) or self._at)
    monkeypatch.setattr(audiofile._Target, "seek", lambda self, *_: signal.raise_signal(number) or self._at)
    before = signal.signal(number, stop)
    try:
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path / "a.wav", np.zeros((1, 100), np.float32))
        assert signal.getsignal(number) is stop
    finally:
        signal.signal(number, before)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("rate", [1, 8000, 200_001, 1_000_000])
@pytest.mark.parametrize("channels", [1, 64])
@pytest.mark.parametrize(
    ("kind", "subtype"),
    [
        ("WAV", "FLOAT"),
        ("RF64", "PCM_16"),
        ("FLAC", "PCM_16"),
        ("OGG", "VORBIS"),
        ("OGG", "OPUS"),
        ("MP3", "MPEG_LAYER_III"),
        ("AIFF", "PCM_24"),
    ],
)
def test_what_a_format_holds_or_refuses(tmp_path, rate, channels, kind, subtype):
    """libsndfile ends the process at Vorbis above 200 kHz."""
    refused = ""
    try:
        with new_audio(tmp_path / "a", rate, channels, kind, subtype) as sink:
            sink.write(np.zeros((channels, 2000), np.float32))
            sink.encode()
    except OutputError as error:
        refused = str(error)
    if refused:
        assert f"{channels} channels at {rate} Hz as {kind}" in refused
        assert os.listdir(tmp_path) == []
    else:
        assert sf.info(tmp_path / "a").channels == channels
