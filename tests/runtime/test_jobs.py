import json
import os
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
from clapsep.runtime.errors import InputError
from clapsep.runtime.jobs import Asked, plan_jobs
from clapsep.runtime.query import Query

RAIN = Asked({"": Query("rain")}, Query())
NAMED = Asked({"dog": Query("a dog"), "rain": Query("rain")}, Query("wind"))


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Make empty files below the working directory."""
    monkeypatch.chdir(tmp_path)

    def make(*names):
        for name in names:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()

    return make


def planned(inputs, output="out", asked=RAIN):
    return {str(job.mixture): [str(path) for path in job.outputs] for job in plan_jobs(inputs, Path(output), asked)}


def test_one_file_into_a_file_or_a_folder(files):
    files("a.wav")
    assert planned(["a.wav"], "b.flac") == {"a.wav": ["b.flac"]}
    assert planned(["a.wav"]) == {"a.wav": ["out/a.wav"]}
    assert planned(["a.wav"], asked=NAMED) == {"a.wav": ["out/a.dog.wav", "out/a.rain.wav"]}


def test_folders_keep_their_structure_and_leave_out_what_is_no_audio_and_the_results(files):
    files("rec/a.wav", "rec/b/c.FLAC", "rec/b/d.au", "rec/notes.txt", "rec/.hidden.wav", "rec/.git/x.wav", "rec/out/a.wav")
    assert planned(["rec"], "rec/out") == {
        "rec/a.wav": ["rec/out/a.wav"],
        "rec/b/c.FLAC": ["rec/out/b/c.FLAC"],
        "rec/b/d.au": ["rec/out/b/d.wav"],
    }


def test_patterns(files):
    files("rec/a.wav", "rec/b.wav", "rec/c/d.wav", "rec/e[1].wav")
    assert list(planned(["rec/*.wav"])) == ["rec/a.wav", "rec/b.wav", "rec/e[1].wav"]
    assert list(planned(["rec/**/*.wav"])) == ["rec/a.wav", "rec/b.wav", "rec/c/d.wav", "rec/e[1].wav"]
    assert planned(["rec/*/*.wav"]) == {"rec/c/d.wav": ["out/c/d.wav"]}
    assert list(planned(["rec/**/*.wav"], "rec/c")) == ["rec/a.wav", "rec/b.wav", "rec/e[1].wav"]  # not the results
    assert planned(["rec/c/../*.wav"])["rec/c/../a.wav"] == ["out/a.wav"]
    assert planned(["rec/c*/../../rec/a.wav"]) == {"rec/c/../../rec/a.wav": ["out/a.wav"]}  # never above the output folder
    with pytest.raises(InputError, match="no file but results"):
        planned(["rec/c/*.wav"], "rec")
    assert planned(["rec/e[1].wav"], "o.wav") == {"rec/e[1].wav": ["o.wav"]}  # a file is a file, whatever its name


def test_what_cannot_be_written_in_the_mixtures_format_becomes_wav(files):
    files("a.caf", "noname")
    assert planned(["a.caf", "noname"]) == {"a.caf": ["out/a.wav"], "noname": ["out/noname.wav"]}


def test_a_job_list_of_lines(files, tmp_path):
    files("lists/a.wav", "lists/b.wav", "lists/q.wav")
    lines = [
        {"input": "a.wav"},
        {"input": "a.wav", "output": "deep/a2.flac", "positive": "wind", "negative": "rain", "alpha": 0.25},
        {"input": "b.wav", "positive_audio": ["q.wav"], "negative": "rain"},
        {"input": str(tmp_path / "lists/b.wav"), "output": "c.wav", "targets": {"x": "a cat", "y": "a cow"}},
    ]
    Path("lists/jobs.jsonl").write_text("\n\n".join(json.dumps(line) for line in lines))
    jobs = plan_jobs(["lists/jobs.jsonl"], Path("out"), RAIN)
    assert [[str(path) for path in job.outputs] for job in jobs] == [
        ["out/a.wav"],
        ["out/deep/a2.flac"],
        ["out/b.wav"],
        ["out/c.x.wav", "out/c.y.wav"],
    ]
    assert jobs[0].asked is RAIN
    assert jobs[1].asked == Asked({"": Query("wind", [], 0.25)}, Query("rain", [], 0.25))
    assert jobs[2].asked.targets[""].audio == [Path("lists/q.wav")]
    assert [query.text for query in jobs[3].asked.targets.values()] == ["a cat", "a cow"]


def test_a_job_list_with_columns(files):
    files("a.wav", "b.wav", "q.wav", "r.wav")
    rows = 'input,output,positive,positive_audio,alpha\na.wav,x.wav,"a dog, barking",q.wav; r.wav,0.2\nb.wav,,,,\n'
    Path("jobs.csv").write_text("\ufeff" + rows, encoding="utf-8")
    first, second = plan_jobs(["jobs.csv"], Path("out"), RAIN)
    assert first.asked.targets[""] == Query("a dog, barking", [Path("q.wav"), Path("r.wav")], 0.2)
    assert second.asked is RAIN


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("j.jsonl", "{", "line 1 is not JSON"),
        ("j.jsonl", "\n[1]", "line 2 is not an object"),
        ("j.jsonl", "[" * 100_000, "is not JSON"),
        ("j.jsonl", "", "has no jobs"),
        ("j.jsonl", '{"input": "a.wav", "postive": "x"}', "unknown field 'postive'"),
        ("j.jsonl", '{"positive": "x"}', "has no input"),
        ("j.jsonl", '{"input": 3}', "input is not a text"),
        ("j.jsonl", '{"input": "b.wav"}', "b.wav is not a file"),
        ("j.jsonl", '{"input": "a\\u0000.wav"}', "no file can be called"),
        ("j.jsonl", '{"input": "a.wav", "output": "../x.wav"}', "not below the output"),
        ("j.jsonl", '{"input": "a.wav", "output": "/tmp/x.wav"}', "not below the output"),
        ("j.jsonl", '{"input": "a.wav", "output": "."}', "not below the output"),
        ("j.jsonl", '{"input": "a.wav", "positive": " "}', "asks for nothing"),
        ("j.jsonl", '{"input": "a.wav", "positive": "x", "alpha": "much"}', "alpha is 'much'"),
        ("j.jsonl", '{"input": "a.wav", "positive": "x", "alpha": NaN}', "alpha is nan"),
        ("j.jsonl", '{"input": "a.wav", "positive": "x", "alpha": 1%s}' % ("0" * 400), "alpha is 1"),
        ("j.jsonl", '{"input": "a.wav", "alpha": 0.5}', "gives an alpha and no query"),
        ("j.jsonl", '{"input": "a.wav", "alpha": "much"}', "alpha is 'much'"),
        ("j.jsonl", '{"input": "a.wav", "positive_audio": [3]}', "examples are given as"),
        ("j.jsonl", '{"input": "a.wav", "targets": ["x"]}', "targets must be like"),
        ("j.jsonl", '{"input": "a.wav", "targets": {"../x": "a"}}', "is not NAME=TEXT"),
        ("j.jsonl", '{"input": "a.wav", "targets": {"x": 3}}', "is not NAME=TEXT"),
        ("j.jsonl", '{"input": "a.wav"}\n{"input": "a.wav", "output": "./a.wav"}', "both be written"),
        ("j.csv", "input,targets\na.wav,dog=a dog\n", "targets must be like"),
        ("j.jsonl", '{"input": "a.wav", "output": "a.doc"}', "a.doc has no known audio extension"),
        ("j.jsonl", '{"input": "a.wav", "output": "a\\u0000.wav"}', "no file can be called"),
        ("j.jsonl", '{"input": "a.wav", "positive_audio": "a\\u0000.wav"}', "no file can be called"),
        ("j.jsonl", '{"input": "a.wav", "output": "\\ud800.wav"}', "no file can be called"),
        ("j.csv", "input,positive\na.wav,x,y\n", "line 2 has other columns"),
        ("j.csv", "input,positive\na.wav\n", "line 2 has other columns"),
        ("j.csv", 'input\n"a.wav', "is not CSV"),
    ],
)
def test_job_lists_that_cannot_be(files, name, text, reason):
    files("a.wav")
    Path(name).write_text(text)
    with pytest.raises(InputError, match=reason):
        plan_jobs([name], Path("out"), RAIN)


def test_targets_in_a_table(files):
    files("a.wav")
    Path("jobs.csv").write_text('input,targets\na.wav,"{""dog"": ""a dog"", ""x"": ""rain""}"\n')
    (job,) = plan_jobs(["jobs.csv"], Path("out"), RAIN)
    assert [str(path) for path in job.outputs] == ["out/a.dog.wav", "out/a.x.wav"]
    assert job.where == "jobs.csv line 2"


@pytest.mark.parametrize(("system", "fine"), [("linux", True), ("darwin", False)])
def test_names_that_differ_in_case_are_one_where_file_systems_know_none(files, monkeypatch, system, fine):
    files("a.wav", "b/A.wav")
    monkeypatch.setattr(sys, "platform", system)
    if fine:
        assert len(planned(["a.wav", "b/A.wav"])) == 2
        return
    with pytest.raises(InputError, match="of a.wav and of b/A.wav"):
        planned(["a.wav", "b/A.wav"])


def test_a_job_list_that_is_no_text(files):
    Path("j.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"j\.jsonl cannot be read as UTF-8"):
        plan_jobs(["j.jsonl"], Path("out"), RAIN)


@pytest.mark.parametrize(
    ("inputs", "output", "asked", "reason"),
    [
        (["no.wav"], "o.wav", RAIN, "no.wav is not a file"),
        (["*.ogg"], "out", RAIN, "matches no file"),
        (["empty"], "out", RAIN, "holds no audio"),
        (["a.wav"], "o.doc", RAIN, "no known audio extension"),
        (["a.wav"], "no/o.wav", RAIN, "no is not a directory"),
        (["a.wav", "b/a.wav"], "out", RAIN, "two results"),
        (["a.wav", "b/A.wav"], "o.wav", RAIN, "give a directory"),
        (["a.wav"], "-", RAIN, "give a directory"),
        (["a.wav"], "noname", RAIN, "give a directory"),
        (["a.wav"], ".", RAIN, "overwrite a mixture"),
        (["b"], "b", NAMED, "holds the mixtures"),
        (["a.wav"], "q.wav", Asked({"": Query("x", [Path("q.wav")])}, Query()), "overwrite an example"),
    ],
)
def test_what_cannot_be_done_is_said_at_once(files, inputs, output, asked, reason):
    files("a.wav", "b/a.wav", "b/A.wav", "q.wav", "noname")
    os.mkdir("empty")
    with pytest.raises(InputError, match=reason):
        plan_jobs(inputs, Path(output), asked)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_cannot_be_read_is_not_left_out_in_silence(files):
    files("rec/a.wav", "rec/b/c.wav")
    os.chmod("rec/b", 0)
    with pytest.raises(InputError, match="rec/b cannot be read"):
        plan_jobs(["rec"], Path("out"), RAIN)


def test_links_in_a_circle(files):
    files("a.wav")
    os.mkdir("out")
    os.symlink("a.wav", "out/a.wav")
    assert planned(["a.wav"]) == {"a.wav": ["out/a.wav"]}


def test_an_error_while_a_folder_is_walked_is_said(files, monkeypatch):
    files("rec/a.wav")
    monkeypatch.setattr(os, "scandir", Mock(side_effect=PermissionError(13, "Permission denied", "rec")))
    with pytest.raises(InputError, match=r"rec cannot be read \(Permission denied\)"):
        plan_jobs(["rec"], Path("out"), RAIN)
