import fcntl
import os
import signal
import subprocess
import sys

import pytest
from clapsep.runtime.errors import OutputError, OutputExists
from clapsep.runtime.outputs import new_file, remove_leftovers

WRITER = """
import sys, time
from pathlib import Path
from clapsep.runtime.outputs import new_file
with new_file(Path(sys.argv[1])) as file:
    file.write(b"half")
    file.flush()
    print("begun", flush=True)
    time.sleep(60)
"""


def test_a_file_has_its_name_only_when_it_is_complete(tmp_path):
    with new_file(tmp_path / "a") as file:
        file.write(b"all")
        assert not (tmp_path / "a").exists()
    assert (tmp_path / "a").read_bytes() == b"all"
    with pytest.raises(KeyboardInterrupt), new_file(tmp_path / "b"):
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == ["a"]


def test_nothing_is_overwritten_without_consent(tmp_path):
    (tmp_path / "a").write_bytes(b"precious")
    with pytest.raises(OutputExists, match="--force"), new_file(tmp_path / "a"):
        pytest.fail("it was opened")
    assert (tmp_path / "a").read_bytes() == b"precious"
    with new_file(tmp_path / "a", force=True) as file:
        file.write(b"new")
    assert (tmp_path / "a").read_bytes() == b"new"


def test_a_file_made_meanwhile_is_not_replaced(tmp_path):
    path = tmp_path / "a.wav"
    with pytest.raises(OutputExists), new_file(path, force=False):
        path.write_bytes(b"theirs")
    assert path.read_bytes() == b"theirs"
    assert os.listdir(tmp_path) == ["a.wav"]


def test_a_full_disk_leaves_nothing(small_disk):
    disk = small_disk(64)
    with pytest.raises(OutputError, match="No space left"), new_file(disk / "a") as file:
        file.write(bytes(100_000))
    assert os.listdir(disk) == []


def test_what_a_killed_writer_left_is_removed_and_what_is_being_written_is_not(tmp_path):
    killed = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path / "killed")], stdout=subprocess.PIPE)
    assert killed.stdout is not None
    assert killed.stdout.readline()
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    (tmp_path / ".notes.part").write_bytes(b"somebody else's")
    (left,) = set(tmp_path.glob(".*.clapsep-part"))
    with new_file(tmp_path / "mine") as file:
        assert remove_leftovers(tmp_path) == [left]
        file.write(b"all")
    assert sorted(os.listdir(tmp_path)) == [".notes.part", "mine"]


def test_a_link_is_not_followed(tmp_path):
    (tmp_path / "target").write_bytes(b"precious")
    link = tmp_path / ".0123456789abcdef.clapsep-part"
    link.symlink_to(tmp_path / "target")
    assert remove_leftovers(tmp_path) == []
    assert (tmp_path / "target").exists()


def test_a_locked_file_stays(tmp_path):
    path = tmp_path / ".0123456789abcdef.clapsep-part"
    with path.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert remove_leftovers(tmp_path) == []
    assert remove_leftovers(tmp_path) == [path]


def test_a_file_that_was_taken_for_a_leftover_before_it_was_locked_is_made_again(tmp_path, monkeypatch):
    lock, removed = fcntl.flock, []

    def late(file, how):
        if not removed and how == fcntl.LOCK_EX:
            removed.extend(remove_leftovers(tmp_path))
        lock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with new_file(tmp_path / "a") as file:
        file.write(b"all")
    assert len(removed) == 1
    assert (tmp_path / "a").read_bytes() == b"all"


def test_what_else_goes_wrong_is_not_put_down_to_the_output(tmp_path):
    def fail():
        with new_file(tmp_path / "a"):
            (tmp_path / "elsewhere").read_bytes()

    with pytest.raises(FileNotFoundError, match="elsewhere"):
        fail()
    assert os.listdir(tmp_path) == []


def test_names_as_long_as_the_file_system_allows_and_links_to_nowhere(tmp_path):
    with new_file(tmp_path / ("漢" * 83)) as file:
        file.write(b"all")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OutputExists), new_file(tmp_path / "link"):
        pytest.fail("it was opened")
