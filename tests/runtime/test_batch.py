import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
from clapsep.runtime.audiofile import read_audio

FILES, BROKEN, RATE = 200, 10, 8000


def records(folder):
    return [json.loads(line) for line in (folder / "clapsep.jsonl").read_text().splitlines()]


@pytest.fixture
def folder(tmp_path):
    """200 recordings of half a second in folders, of which 10 are broken in several ways."""
    for i in range(FILES):
        path = tmp_path / "in" / f"{i % 7}" / f"{i:03}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        sf.write(path, np.random.default_rng(i).uniform(-0.5, 0.5, RATE // 2), RATE, subtype="PCM_16")
        if i % (FILES // BROKEN) == 3:
            path.write_bytes([b"", b"RIFF", path.read_bytes()[:30], b"not audio" * 99][i // 20 % 4])
    return tmp_path / "in"


def wait_for(folder, count, process):
    while sum(1 for _ in folder.glob("**/*.wav")) < count:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_folder_that_is_killed_twice_and_resumed(run, start, demo_bundle, separator, folder, tmp_path, jobs):
    out = tmp_path / "out"
    words = ["separate", demo_bundle, folder, "--positive", "rain", "-o", out, "--jobs", jobs, "--resume"]
    for count in (50, 120):
        process = start("clapsep", *words)
        wait_for(out, count, process)
        process.send_signal(signal.SIGKILL)
        process.wait()
        (out / "3" / ".0123456789abcdef.clapsep-part").write_bytes(b"half")  # kill -9 rarely leaves one: make sure of it
    with (out / "clapsep.jsonl").open("a") as log:
        log.write('{"torn')
    done = run("clapsep", *words, code=1)
    assert f" done, {BROKEN} failed, " in done.stderr
    assert sum("error: " in line for line in done.stderr.splitlines()) == BROKEN
    outputs = sorted(path for path in out.rglob("*") if path.is_file())
    assert len(outputs) == FILES - BROKEN + 1
    assert not list(out.rglob("*.clapsep-part"))
    for output in outputs:
        if output.suffix == ".wav":
            mixture, rate = read_audio(folder / output.relative_to(out))
            wanted = separator.separate(mixture, rate, "rain")
            np.testing.assert_allclose(read_audio(output)[0], wanted, atol=2**-15)
    again = run("clapsep", *words, code=1)
    assert f"0 done, {BROKEN} failed, {FILES - BROKEN} skipped" in again.stderr
    log = [json.loads(line) for line in (out / "clapsep.jsonl").read_text().splitlines() if line != '{"torn']
    assert Counter(record["error"] for record in log if record["status"] == "failed").keys() == {"AudioError"}
    assert max(Counter(record["input"] for record in log if record["status"] == "made").values()) == 1


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_an_interrupt_leaves_whole_files_and_resume_goes_on(start, run, demo_bundle, folder, tmp_path, name):
    out = tmp_path / "out"
    words = ["separate", demo_bundle, folder / "1", folder / "2", "--positive", "rain", "-o", out, "--jobs", "2"]
    process = start("clapsep", *words)
    wait_for(out, 5, process)
    process.send_signal(getattr(signal, name))
    assert process.wait(60) == 130
    said = process.stderr.read()
    assert "--resume goes on from here" in said
    assert "Traceback" not in said
    assert not list(out.rglob("*.clapsep-part"))
    for path in out.rglob("*.wav"):
        assert sf.info(path).frames == RATE // 2
    run("clapsep", *words, "--resume", code=1)


def test_resume_makes_again_what_is_another_question_or_mixture(run, demo_bundle, wav, tmp_path):
    out, mixtures = tmp_path / "out", [wav("a.wav"), wav("b.wav", n=17000)]
    words = ["separate", demo_bundle, *mixtures, "-o", out, "--resume", "--positive"]
    run("clapsep", *words, "rain")
    assert "0 done, 0 failed, 2 skipped" in run("clapsep", *words, "rain").stderr
    assert "a.wav exists and its mixture, question, bundle or settings have changed" in run("clapsep", *words, "wind", code=2).stderr
    assert "2 done" in run("clapsep", *words, "wind", "--force").stderr
    wav("b.wav", n=18000)
    assert "b.wav exists and its mixture" in run("clapsep", *words, "wind", code=2).stderr
    assert "1 done, 0 failed, 1 skipped" in run("clapsep", *words, "wind", "--force").stderr
    assert sf.info(out / "b.wav").frames == 18000
    done = records(out)[-1]
    assert (done["status"], done["seconds"], done["notes"]) == ("done", 18000 / 32000, [])
    assert done["rtf"] == pytest.approx(done["took"] / done["seconds"])


def test_an_output_that_was_changed_since_is_not_taken_for_finished(run, demo_bundle, wav, tmp_path):
    out = tmp_path / "out"
    words = ["separate", demo_bundle, wav("a.wav"), "-o", out, "--resume", "--positive", "rain"]
    run("clapsep", *words)
    (out / "a.wav").write_bytes(b"junk")
    assert "a.wav exists and has been changed since it was made" in run("clapsep", *words, code=2).stderr
    run("clapsep", *words, "--force")
    run("clapsep", "separate", demo_bundle, tmp_path / "a.wav", "-o", out / "a.wav", "--positive", "wind", "--force")
    assert "a.wav exists and has been changed since it was made" in run("clapsep", *words, code=2).stderr


def test_what_a_kill_left_of_several_outputs_is_made_again(run, demo_bundle, wav, tmp_path, monkeypatch):
    out = tmp_path / "out"
    words = ["separate", demo_bundle, wav("a.wav"), "-o", out, "--resume", "--target", "dog=a dog", "--target", "rain=rain"]
    run("clapsep", *words)
    dog = (out / "a.dog.wav").read_bytes()
    log = (out / "clapsep.jsonl").read_text().splitlines(keepends=True)
    (out / "clapsep.jsonl").write_text("".join(log[:-1]))  # killed before the last name was given, and before it was said
    (out / "a.dog.wav").unlink()
    monkeypatch.chdir(tmp_path)
    words[words.index(out)] = "../" + tmp_path.name + "/./out"  # the same place by another name
    run("clapsep", *words)
    assert (out / "a.dog.wav").read_bytes() == dog
    assert [record["status"] for record in records(out)] == ["started", "made", "started", "made", "done"]


def test_a_log_that_is_none_or_is_in_use(run, start, demo_bundle, wav, tmp_path):
    source = wav("a.wav")
    jobs = tmp_path / "jobs.jsonl"
    jobs.write_text('{"input": "a.wav"}\n')
    words = ["separate", demo_bundle, jobs, "--positive", "rain", "-o", tmp_path / "out"]
    assert "is no log of an earlier run" in run("clapsep", *words, "--log", jobs, code=2).stderr
    assert jobs.read_text() == '{"input": "a.wav"}\n'
    (tmp_path / "busy").mkdir()
    with (tmp_path / "busy" / "clapsep.jsonl").open("a") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        done = run("clapsep", "separate", demo_bundle, source, "--positive", "rain", "-o", tmp_path / "busy", code=2)
    assert "another run is writing to" in done.stderr


def test_ctrl_c_for_the_whole_group_while_workers_start(demo_bundle, folder, tmp_path):
    words = ["separate", demo_bundle, folder, "--positive", "rain", "-o", tmp_path / "out", "--jobs", "2"]
    for delay in (0.6, 0.9, 1.2):
        process = subprocess.Popen(
            [sys.executable, "-m", "clapsep.runtime", *map(str, words), "--force"],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        assert process.stderr is not None
        assert any("separating" in line for line in process.stderr)
        time.sleep(delay)
        os.killpg(process.pid, signal.SIGINT)
        said = process.communicate(timeout=60)[1]
        assert process.returncode == 130
        assert "Traceback" not in said


def test_outputs_of_others_are_not_taken_for_finished(run, demo_bundle, wav, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    shutil.copy(wav("a.wav"), out / "a.wav")
    words = ["separate", demo_bundle, tmp_path / "a.wav", "--positive", "rain", "-o", out]
    assert "a.wav exists" in run("clapsep", *words, code=2).stderr
    assert "clapsep.jsonl is not there to say what made it" in run("clapsep", *words, "--resume", code=2).stderr


def test_a_job_list_asks_every_mixture_its_own_question(run, demo_bundle, separator, wav, tmp_path):
    wav("a.wav", subtype="FLOAT")
    lines = [
        {"input": "a.wav", "positive": "rain"},
        {"input": "a.wav", "output": "b.wav", "positive": "a siren", "negative": "rain"},
        {"input": "a.wav", "output": "c.wav", "positive_audio": ["missing.wav"]},
        {"input": "a.wav", "output": "d.wav", "targets": {"x": "wind"}},
    ]
    (tmp_path / "jobs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    done = run("clapsep", "separate", demo_bundle, tmp_path / "jobs.jsonl", "-o", tmp_path / "out", code=1)
    assert re.search(r"error: \S+jobs.jsonl line 3: \S+missing.wav is not a file", done.stderr)
    mixture, rate = read_audio(tmp_path / "a.wav")
    for name, question in {"a.wav": ("rain", None), "b.wav": ("a siren", "rain"), "d.x.wav": ("wind", None)}.items():
        np.testing.assert_array_equal(read_audio(tmp_path / "out" / name)[0], separator.separate(mixture, rate, *question))


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_bad_common_question_runs_nothing(run, demo_bundle, folder, tmp_path, jobs):
    words = ["separate", demo_bundle, folder, "-o", tmp_path / "out", "--jobs", jobs]
    assert "q.wav is not a file" in run("clapsep", *words, "--positive-audio", tmp_path / "q.wav", code=2).stderr
    assert "neither a positive nor a negative" in run("clapsep", *words, code=2).stderr
    assert not list((tmp_path / "out").rglob("*.wav"))


def test_notes_of_a_file_are_said_and_logged(run, demo_bundle, wav, tmp_path):
    whole = wav("whole.wav", n=32000).read_bytes()
    (tmp_path / "cut.wav").write_bytes(whole[:30_000])
    done = run("clapsep", "separate", demo_bundle, tmp_path / "cut.wav", "--positive", "rain", "-o", tmp_path / "out")
    assert "cut.wav ends early" in done.stderr
    assert "ends early" in records(tmp_path / "out")[-1]["notes"][0]


def test_limits_and_logs_of_the_command(run, demo_bundle, wav, tmp_path):
    source = wav("a.wav", n=64000, channels=2)
    words = ["separate", demo_bundle, source, "--positive", "rain", "-o", tmp_path / "o.wav"]
    assert "longer than 1 s" in run("clapsep", *words, "--max-seconds", "1", code=2).stderr
    assert "--max-channels" in run("clapsep", *words, "--max-channels", "1", code=2).stderr
    assert "--max-bytes" in run("clapsep", *words, "--max-bytes", "99", code=2).stderr
    assert "does not end in .jsonl" in run("clapsep", *words, "--log", tmp_path / "a.wav", code=2).stderr
    assert "--resume needs the log" in run("clapsep", *words, "--resume", code=2).stderr
    run("clapsep", *words, "--log", tmp_path / "mine.jsonl", "--hop", "1", "--overlap", "0.5")
    assert "done" in (tmp_path / "mine.jsonl").read_text()
    run("clapsep", *words, "--log", tmp_path / "mine.jsonl", "--hop", "1", "--overlap", "0.5", "--resume")


def test_a_place_that_cannot_be_written_is_known_before_anything_is_computed(run, demo_bundle, wav, small_disk):
    done = run("clapsep", "separate", demo_bundle, wav(), "--positive", "rain", "-o", small_disk(64, ",ro") / "o.wav", code=1)
    assert "Read-only" in done.stderr


def test_a_full_disk_costs_one_file_and_leaves_no_part(run, demo_bundle, tmp_path, small_disk):
    disk = small_disk(400)
    for name, n in (("a.wav", 5000), ("b.wav", 500_000), ("c.wav", 5000)):
        sf.write(tmp_path / name, np.random.default_rng(n).uniform(-0.5, 0.5, n), RATE)
    done = run("clapsep", "separate", demo_bundle, *sorted(tmp_path.glob("*.wav")), "--positive", "rain", "-o", disk, code=1)
    assert "2 done, 1 failed" in done.stderr
    assert "No space left" in done.stderr
    assert sorted(os.listdir(disk)) == ["a.wav", "c.wav", "clapsep.jsonl"]


def test_a_parent_that_is_killed_takes_its_workers_along(start, demo_bundle, folder, tmp_path):
    process = start("clapsep", "separate", demo_bundle, folder, "--positive", "rain", "-o", tmp_path / "out", "--jobs", "2")
    wait_for(tmp_path / "out", 3, process)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(workers) >= 2
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 60
    while any(Path("/proc", worker).exists() for worker in workers):
        assert time.monotonic() < deadline, "workers outlived their parent"
        time.sleep(0.05)
    assert not list((tmp_path / "out").rglob("*.clapsep-part"))
