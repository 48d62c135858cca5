import os
import pty
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from clapsep.runtime import Query, Separator
from clapsep.runtime.errors import AudioError, OutputError
from clapsep.runtime.pcm import FORMATS, Reader, decode, encode, whole_frames, write_all
from hypothesis import given, settings
from hypothesis import strategies as st

HOP, OVERLAP = 1.0, 0.25  # the command's defaults
INTEGERS = sorted(set(FORMATS) - {"f32le"})


def noise(n, channels=1, seed=0, level=0.5):
    return np.random.default_rng(seed).uniform(-level, level, (channels, n)).astype(np.float32)


@given(st.sampled_from(sorted(FORMATS)), st.integers(1, 5), st.data())
def test_bytes_survive_decoding_and_encoding(form, channels, data):
    """All but s32le, which has more bits than float32: there the 24 highest are kept."""
    size = FORMATS[form] * channels
    raw = data.draw(st.binary(max_size=20 * size).map(lambda b: b[: len(b) - len(b) % size]))
    samples = decode(raw, form, channels)
    assert (samples.dtype, samples.shape) == (np.float32, (channels, len(raw) // size))
    back, clipped = encode(samples, form)
    if form == "s32le":
        ints, old = np.frombuffer(back, "<i4").astype(np.int64), np.frombuffer(raw, "<i4").astype(np.int64)
        assert np.all(np.abs(ints - old) <= np.maximum(1, np.abs(old) / 2**24))
    else:
        assert back == raw
    assert clipped == 0


def test_the_formats_are_ffmpegs():
    assert decode(b"\x00\x80\xff\x7f", "s16le", 1).tolist() == [[-1.0, 32767 / 32768]]
    assert decode(b"\x00\x00\x80\x01\x00\x00", "s24le", 1).tolist() == [[-1.0, 2.0**-23]]
    assert decode(b"\x00\x00\x00\x80\x00\x00\x00\x40", "s32le", 2).tolist() == [[-1.0], [0.5]]
    assert decode(np.array([1.5, -2], "<f4").tobytes(), "f32le", 1).tolist() == [[1.5, -2.0]]
    assert encode(np.array([[0.5, -1], [0, 1]], np.float32), "s16le")[0] == np.array([16384, 0, -32768, 32767], "<i2").tobytes()


@pytest.mark.parametrize("form", INTEGERS)
def test_what_is_beyond_full_scale_is_clipped_and_counted(form):
    samples = np.array([[1.0, 1.0001, -1.0, -3.0, 0.25]], np.float32)
    data, clipped = encode(samples, form)
    assert clipped == 2
    np.testing.assert_allclose(decode(data, form, 1), [[1, 1, -1, -1, 0.25]], atol=2.0**-15)
    assert encode(samples, "f32le") == (samples.tobytes(), 0)


class Pieces:
    """A source that gives whatever sizes it was told to, at most what was asked for."""

    def __init__(self, data, sizes):
        self.data, self.sizes = data, iter(sizes)

    def __call__(self, most):
        size = min(next(self.sizes, most), most)
        piece, self.data = self.data[:size], self.data[size:]
        return piece


@given(st.binary(max_size=300), st.lists(st.integers(1, 40)), st.integers(1, 12), st.integers(1, 7))
def test_frames_are_whole_whatever_the_pieces(data, sizes, frame, most):
    got = list(whole_frames(Pieces(data, sizes), frame, most))
    assert all(len(piece) % frame == 0 and len(piece) <= most * frame for piece in got)
    assert b"".join(got) == data[: len(data) - len(data) % frame]


def test_a_torn_frame_is_a_warning(caplog):
    assert list(whole_frames(Pieces(b"1234567", []), 4, 10)) == [b"1234"]
    assert "its last 3 bytes of 4 were left out" in caplog.text


@settings(deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=5000), max_size=20), st.integers(1, 3000), st.integers(1, 3000))
def test_the_reader_drops_nothing_and_holds_no_more_than_its_limit(pieces, limit, size):
    source, sink = os.pipe()

    def feed():
        for piece in pieces:
            write_all(sink, piece)
        os.close(sink)

    thread, got = threading.Thread(target=feed), []
    reader = Reader(source, limit)
    thread.start()
    while piece := reader.read(size):
        got.append(piece)
    thread.join()
    os.close(source)
    assert b"".join(got) == b"".join(pieces)
    assert reader.most <= limit
    assert reader.read(size) == b""


def test_the_reader_reads_while_nobody_asks_and_then_lets_the_writer_wait():
    source, sink = os.pipe()
    os.set_blocking(sink, False)
    reader, written, quiet = Reader(source, 300_000), 0, 0
    while quiet < 20:  # one second without room
        try:
            written += os.write(sink, bytes(4096))
            quiet = 0
        except BlockingIOError:
            quiet += 1
            time.sleep(0.05)
    assert reader.most == 300_000
    assert 300_000 < written < 300_000 + (1 << 17)
    os.close(sink)
    assert sum(len(piece) for piece in iter(lambda: reader.read(7777), b"")) == written
    os.close(source)


def test_what_cannot_be_read_or_written_is_said(tmp_path):
    with pytest.raises(AudioError, match="input cannot be read \\(Is a directory"):
        Reader(os.open(tmp_path, os.O_RDONLY), 10).read(5)
    with open("/dev/full", "wb") as full, pytest.raises(OutputError, match="No space left"):
        write_all(full.fileno(), b"x")


@pytest.fixture(scope="module")
def live(demo_bundle):
    return Separator(demo_bundle, hop=HOP, overlap=OVERLAP)


def words(bundle, *args):
    return [sys.executable, "-m", "clapsep.runtime", "stream", str(bundle), *map(str, args)]


def stream(bundle, data, *args, code=0):
    """The command's output and what it said."""
    done = subprocess.run(words(bundle, *args), input=data, capture_output=True, check=False, timeout=300)
    said = done.stderr.decode()
    assert done.returncode == code, said
    assert "Traceback" not in said
    return done.stdout, said


def test_the_command_gives_what_separate_gives_sample_for_sample(demo_bundle, live):
    x = noise(150_001)[0]
    out, said = stream(demo_bundle, x.tobytes(), "--positive", "rain", "--negative", "a dog barking")
    np.testing.assert_array_equal(np.frombuffer(out, "<f4"), live.separate(x, 32000, "rain", "a dog barking"))
    assert "32000 Hz, 1 channel, f32le; latency 1.25 s (hop 1 s + overlap 0.25 s) and the time of computing" in said
    assert "4.7 s of audio, RTF" in said
    assert "longest time in one push" in said


def test_all_its_options_reach_the_separator(demo_bundle, wav):
    clip, x = wav("clip.wav", n=30000), 3 * noise(90_000)[0]
    args = ["--positive", "rain", "--positive-audio", clip, "--alpha", 0.3, "--no-normalize", "--threads", 1]
    out, said = stream(demo_bundle, x.tobytes(), *args, "--hop", 0.5, "--overlap", 0.1, "--peak", 2)
    separator = Separator(demo_bundle, threads=1, normalize=False)
    opened = separator.stream(Query("rain", [clip], 0.3), hop=0.5, overlap=0.1, peak=2)
    np.testing.assert_allclose(np.frombuffer(out, "<f4"), np.concatenate([opened.push(x), opened.finish()]), atol=1e-6)
    assert "latency 0.6 s (hop 0.5 s + overlap 0.1 s)" in said


def test_no_overlap_is_what_was_asked_for(demo_bundle):
    _, said = stream(demo_bundle, noise(1000)[0].tobytes(), "--positive", "rain", "--overlap", 0)
    assert "latency 1 s (hop 1 s) and" in said


@pytest.mark.parametrize(("form", "rate", "channels"), [("s16le", 32000, 2), ("s24le", 44100, 2), ("s32le", 8000, 1), ("f32le", 48000, 3)])
def test_formats_rates_and_channels(demo_bundle, live, form, rate, channels):
    data, _ = encode(noise(2 * rate + 5, channels), form)
    out, said = stream(demo_bundle, data, "--positive", "rain", "--format", form, "--rate", rate, "--channels", channels)
    wanted, _ = encode(live.separate(decode(data, form, channels), rate, "rain"), form)
    assert out == wanted
    assert ("resampling" in said) == (rate != 32000)


def test_clipping_and_a_torn_frame_are_said_once(demo_bundle, live):
    """A separated part can be louder than the whole."""
    x = decode(encode(np.sign(np.sin(2 * np.pi * 440 / 32000 * np.arange(100_000)))[None], "s16le")[0], "s16le", 1)[0]
    y = live.separate(x, 32000, "wind")
    beyond = int(np.sum(np.abs(y) > 1))
    assert beyond > 0
    out, said = stream(demo_bundle, encode(x[None], "s16le")[0] + b"x", "--positive", "wind", "--format", "s16le")
    assert out == encode(y[None], "s16le")[0]
    assert said.count("last 1 bytes of 2 were left out") == 1
    assert said.count(f"WARNING: {beyond} samples (") == 1
    assert "were beyond full scale and clipped to s16le" in said


def test_no_input_is_no_output(demo_bundle):
    out, said = stream(demo_bundle, b"", "--positive", "rain")
    assert out == b""
    assert "no samples came in" in said


@pytest.mark.parametrize(
    ("args", "data", "reason"),
    [
        ([], b"", "neither a positive nor a negative"),
        (["--positive", "a", "--positive", "b"], b"", "--positive was given 2 times"),
        (["--positive", "a", "--format", "mp3"], b"", "mp3"),
        (["--positive", "a", "--channels", "65"], b"", "65"),
        (["--positive", "a", "--hop", "3"], b"", "hop of 3.0 s does not fit"),
        (["--positive", "a", "--overlap", "nan"], b"", "overlap of nan"),
        (["--positive", "a", "--peak", "nan"], b"", "peak of nan"),
        (
            ["--positive", "a"],
            np.array([0, np.nan], "<f4").tobytes(),
            "after 0.00 s of input: a block has 1 NaN or infinite samples; repair the recording first (--format is f32le)",
        ),
    ],
)
def test_failures_are_one_sentence(demo_bundle, args, data, reason):
    _, said = stream(demo_bundle, data, *args, code=2)
    assert said.strip().splitlines()[-1].lower().startswith("error: ")
    assert reason in said.strip().splitlines()[-1]


@pytest.mark.parametrize("end", ["stdin", "stdout"])
def test_a_terminal_is_refused(demo_bundle, end):
    main, terminal = pty.openpty()
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL} | {end: terminal}
    done = subprocess.run(words(demo_bundle, "--positive", "a"), **pipes, stderr=subprocess.PIPE, text=True, check=False)
    os.close(main), os.close(terminal)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {end} is no pipe or file")


@pytest.fixture
def running(demo_bundle):
    """The command, started and ready to hear."""

    def listen():
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(words(demo_bundle, "--positive", "rain"), **pipes, preexec_fn=listen) as process:
        assert b"latency" in process.stderr.readline()
        yield process
        process.kill()


def test_a_signal_ends_it(running):
    running.stdin.write(noise(64_000).tobytes())
    running.stdin.flush()
    assert len(running.stdout.read(32_000)) == 32_000
    running.send_signal(signal.SIGTERM)
    assert running.wait(30) == 130
    said = running.stderr.read().decode()
    assert said.startswith("interrupted: what was not written yet is lost\n")
    assert "s of audio, RTF" in said
    assert "Traceback" not in said


def test_ctrl_c_loses_nothing_that_came_in(running, live):
    x = noise(64_000)[0]
    running.stdin.write(x.tobytes())
    running.stdin.flush()
    first = running.stdout.read(32_000)
    time.sleep(0.3)
    running.send_signal(signal.SIGINT)
    y = np.frombuffer(first + running.stdout.read(), "<f4")
    assert running.wait(30) == 130
    assert "writing what has come in" in running.stderr.read().decode()
    np.testing.assert_array_equal(y, live.separate(x, 32000, "rain"))


@pytest.mark.parametrize("magic", [b"RIFF", b"fLaC", b"OggS", b"FORM", b"ID3"])
def test_files_are_not_taken_for_pcm(demo_bundle, magic):
    out, said = stream(demo_bundle, magic + bytes(99), "--positive", "rain", "--format", "s16le", code=2)
    assert out == b""
    assert "and not raw PCM" in said


def test_a_signal_ends_it_while_nobody_reads_the_output(running):
    feeder = threading.Thread(target=lambda: write_all(running.stdin.fileno(), noise(96_000).tobytes()))
    feeder.start()
    feeder.join(30)
    time.sleep(0.5)
    running.send_signal(signal.SIGTERM)
    assert running.wait(30) == 130
    assert b"Traceback" not in running.stderr.read()


def test_a_reader_who_goes_ends_it(running):
    running.stdin.write(noise(64_000).tobytes())
    running.stdin.flush()
    assert len(running.stdout.read(10)) == 10
    running.stdout.close()
    running.stdin.write(noise(64_000).tobytes())
    running.stdin.flush()
    assert running.wait(30) == 0
    said = running.stderr.read().decode()
    assert "the reader of the output has gone\n" in said
    assert "Traceback" not in said
    assert "Exception ignored" not in said


def test_results_come_before_the_input_ends(running):
    """All that the latency allows, without waiting for a buffer to fill."""
    running.stdin.write(noise(4 * 32_000).tobytes())
    running.stdin.flush()
    early = int((4 - HOP - OVERLAP) * 32_000)
    assert len(running.stdout.read(4 * early)) == 4 * early
    running.stdin.close()
    assert len(running.stdout.read()) == 4 * (4 * 32_000 - early)


def test_while_nobody_reads_the_writer_waits_and_nothing_is_lost(running, live):
    x, given = noise(40 * 32_000)[0], []

    def feed():
        for piece in np.split(x, 400):
            write_all(running.stdin.fileno(), piece.tobytes())
            given.append(len(piece))
        running.stdin.close()

    feeder = threading.Thread(target=feed)
    feeder.start()
    before = -1
    while before != len(given):
        before = len(given)
        time.sleep(1)
    assert 10 * 32_000 < sum(given) < 15 * 32_000  # the queue, and what the stream and two pipes hold
    out = np.frombuffer(running.stdout.read(), "<f4")
    feeder.join(30)
    np.testing.assert_array_equal(out, live.separate(x, 32000, "rain"))
