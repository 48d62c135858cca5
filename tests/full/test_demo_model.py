"""The demo model separates: figures and orderings of the paper on unseen mixtures, through the finished bundle."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import quality
from clapsep.runtime import Separator

pytestmark = pytest.mark.slow
MIXTURES = 150


@pytest.fixture(scope="module")
def means(demo_bundle):
    """Mean SDRi (dB) of every question over the same mixtures. Without espeak-ng, mixtures hold no speech."""
    if shutil.which("espeak-ng") is None:
        quality.CLASSES = tuple(name for name in quality.CLASSES if name != "speech")
    judge = quality.Judge(Separator(demo_bundle))
    rows: dict[str, list[float]] = {}

    def note(name, value):
        rows.setdefault(name, []).append(value)

    for i in range(MIXTURES):
        scene = quality.make_scene(i, 2, 0.0, judge.samples)
        for kind in ("P", "N", "PN"):
            note(kind, judge.ask(scene, "text", kind)["sdri"])
        note("audio PN", judge.ask(scene, "audio", "PN", 5)["sdri"])
        note("both PN", judge.ask(scene, "both", "PN", 5)["sdri"])
        swapped = judge.swap(scene)
        note("swapped", swapped["sdri"])
        note("swapped, first", swapped["sdri_first"])
        note("absent", judge.absent(scene, "text", "PN")["attenuation"])
        for level in (-10.0, 10.0):
            note(f"{level:+.0f} dB", judge.ask(quality.make_scene(i, 2, level, judge.samples), "text", "PN")["sdri"])
    return {name: float(np.mean(values)) for name, values in rows.items()}


def test_it_extracts_what_is_asked_by_text_audio_and_both(means):
    assert min(means[name] for name in ("PN", "audio PN", "both PN")) >= 10
    assert means["P"] >= 8.5
    assert means["+10 dB"] >= 3


def test_swapped_queries_extract_the_other_source(means):
    assert means["swapped"] >= 9
    assert means["swapped, first"] < 0


def test_more_is_known_with_both_queries_than_with_one(means):
    assert means["PN"] > means["P"] + 0.2
    assert means["PN"] > means["N"] + 0.4


def test_the_better_the_input_the_smaller_the_gain(means):
    assert means["-10 dB"] > means["PN"] + 2
    assert means["PN"] > means["+10 dB"] + 2


def test_what_is_not_there_is_quiet(means):
    assert means["absent"] >= 15
