import collections
import io
import os
import pickle
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch
from clapsep.export.checkpoint import read_checkpoint
from clapsep.runtime.errors import CheckpointError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file


def test_tensors_numpy_and_plain_containers_are_read(tmp_path):
    content = {
        "state_dict": collections.OrderedDict(w=torch.arange(3.0), h=torch.ones(2, dtype=torch.float16)),
        "epoch": 3,
        "loss": np.float64(0.25),
        "steps": np.int64(7),
        "curve": np.arange(4, dtype=np.float32),
        "names": ["a", ("b", None, True)],
    }
    torch.save(content, tmp_path / "a.pt")
    read = read_checkpoint(tmp_path / "a.pt", "clap")
    assert set(read.tensors) == {"w", "h"}
    assert read.source.name == "a.pt"
    assert len(read.source.sha256) == 64


@pytest.mark.parametrize("legacy", [False, True])
def test_flat_dicts_and_the_old_format(tmp_path, legacy):
    torch.save({"w": torch.arange(3.0)}, tmp_path / "a.ckpt", _use_new_zipfile_serialization=not legacy)
    torch.testing.assert_close(read_checkpoint(tmp_path / "a.ckpt", "checkpoint").tensors["w"], torch.arange(3.0))


def test_tensors_of_more_values_than_there_are(tmp_path):
    torch.save({"w": torch.zeros(1).expand(1 << 40)}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"w \[1099511627776\] of more values than it holds"):
        read_checkpoint(tmp_path / "a.pt", "clap")


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/clapsep-was-here",)


class Harmless:
    pass


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(("thing", "name"), [(Evil(), r"(posix|os)\.system"), (Harmless(), "Harmless"), (print, "print")])
def test_anything_else_is_refused_by_name_and_not_run(tmp_path, thing, name, legacy):
    torch.save({"w": torch.zeros(1), "x": thing}, tmp_path / "a.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match=rf"{name}, which is not loaded because it could run code"):
        read_checkpoint(tmp_path / "a.pt", "clap")
    assert not os.path.exists("/tmp/clapsep-was-here")


def test_a_bare_malicious_pickle(tmp_path):
    (tmp_path / "a.pt").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError, match=r"a\.pt"):
        read_checkpoint(tmp_path / "a.pt", "clap")
    assert not os.path.exists("/tmp/clapsep-was-here")


def test_zip_bombs_and_foreign_archives(tmp_path):
    torch.save({"w": torch.zeros(1000)}, tmp_path / "a.pt")
    packed = tmp_path / "bomb.pt"
    with zipfile.ZipFile(tmp_path / "a.pt") as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name) + (bytes(1 << 20) if "data/0" in name else b""))
    with pytest.raises(CheckpointError, match="compressed archive"):
        read_checkpoint(packed, "clap")
    with zipfile.ZipFile(tmp_path / "docs.pt", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(CheckpointError, match=r"docs\.pt is damaged or not a checkpoint"):
        read_checkpoint(tmp_path / "docs.pt", "clap")


def test_missing_empty_truncated_and_tensorless_files(tmp_path):
    torch.save({"w": torch.randn(1000)}, tmp_path / "whole.pt")
    content = (tmp_path / "whole.pt").read_bytes()
    save_file({"w": torch.randn(1000)}, tmp_path / "whole.safetensors")
    (tmp_path / "empty.pt").touch()
    (tmp_path / "half.pt").write_bytes(content[: len(content) // 2])
    (tmp_path / "half.safetensors").write_bytes((tmp_path / "whole.safetensors").read_bytes()[:500])
    (tmp_path / "huge.safetensors").write_bytes(struct.pack("<Q", 1 << 62) + b"{}")
    torch.save({"a": 1}, tmp_path / "numbers.pt")
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    for name, reason in {
        "none.pt": "not a file",
        "empty.pt": "is empty",
        "half.pt": "damaged",
        "half.safetensors": "not a whole safetensors",
        "huge.safetensors": "not a whole safetensors",
        "numbers.pt": "no state dict",
        "tensor.pt": "no state dict",
    }.items():
        with pytest.raises(CheckpointError, match=reason) as caught:
            read_checkpoint(tmp_path / name, "checkpoint")
        assert "--checkpoint" in str(caught.value)
        assert name in str(caught.value)


def test_pickles_that_ask_for_more_than_the_file_has(tmp_path):
    """Python allocates what is asked for before it reads: a file of 20 bytes took 4 GiB."""
    (tmp_path / "a.pt").write_bytes(b"\x80\x02X" + struct.pack("<I", (1 << 32) - 1) + b"few bytes")
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match="damaged"):
            read_checkpoint(tmp_path / "a.pt", "clap")
        assert tracemalloc.get_traced_memory()[1] < 100 << 20
    finally:
        tracemalloc.stop()


def test_names_that_no_file_can_have(tmp_path):
    for name in ("x" * 300, "\0"):
        with pytest.raises(CheckpointError, match="not a file"):
            read_checkpoint(tmp_path / name, "clap")


def test_safetensors_metadata(tmp_path):
    for text, fine in (('{"spec_size": 128}', True), ("[1]", False), ("{", False)):
        save_file({"w": torch.zeros(1)}, tmp_path / "a.safetensors", {"clapsep": text})
        if fine:
            assert read_checkpoint(tmp_path / "a.safetensors", "clap").metadata == {"spec_size": 128}
        else:
            with pytest.raises(CheckpointError, match="metadata"):
                read_checkpoint(tmp_path / "a.safetensors", "clap")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_raise_nothing_but_checkpoint_errors(tmp_path, data):
    whole = io.BytesIO()
    torch.save({"w": torch.arange(8.0), "n": {"a": [1, 2.5, "x"]}}, whole)
    content = bytearray(whole.getvalue())
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "a.pt").write_bytes(content[: data.draw(st.integers(1, len(content)))])
    try:
        read_checkpoint(tmp_path / "a.pt", "clap")
    except CheckpointError:
        pass
