"""The training room: sounds, wordings, questions, loss, and a run of all stages that is over in a minute."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from clapsep.export.checkpoint import read_checkpoint
from clapsep.export.families.clapsep import open_model
from clapsep.runtime.metrics import si_sdr, snr

from training import loss
from training.captions import TEST, TRAIN, caption, corpus
from training.mixtures import ask, at_snr
from training.sounds import CLASSES, RATE, render

ROOT = Path(__file__).parents[2]
needs_espeak = pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="speech is rendered by espeak-ng")


@pytest.mark.parametrize("name", [pytest.param(n, marks=needs_espeak) if n == "speech" else n for n in CLASSES])
def test_sounds_are_reproducible_audible_and_differ_between_training_and_test(name):
    first, again = (render(name, 5, 2 * RATE, test=False) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert first.shape == (2 * RATE,)
    assert np.isfinite(first).all()
    assert np.abs(first).max() == pytest.approx(0.9, abs=1e-3)
    assert not np.array_equal(first, render(name, 5, 2 * RATE, test=True))
    assert not np.array_equal(first, render(name, 6, 2 * RATE, test=False))


def words(texts):
    return {word for text in texts for word in re.findall(r"\w+", text.lower())}


def test_wordings_are_many_and_held_out_ones_use_known_words():
    assert len(CLASSES) >= 16
    known = words(corpus())
    random = np.random.default_rng(0)
    for name in CLASSES:
        assert len(TRAIN[name]) >= 12
        assert len(TEST[name]) >= 4
        assert not set(TRAIN[name]) & set(TEST[name])
        assert words(TEST[name]) <= known
        assert words(caption([name, "rain"], random, test=True) for _ in range(20)) <= known


def test_training_estimates_what_the_separator_separates():
    """The encoder runs once for all questions about a mixture; each estimate is that of the question asked alone."""
    from clapsep.export import torch_dsp
    from clapsep.export.clapsep import Separator

    from training.train import CONFIG, DSP, Batch, Model

    torch.manual_seed(0)
    separator = Separator(CONFIG).eval()
    mixtures, conditions = torch.rand(2, DSP.window_samples) - 0.5, torch.randn(4, CONFIG.condition)
    with torch.inference_mode():
        found = Model(separator)(Batch(mixtures, torch.zeros(4, DSP.window_samples), conditions), half=False)
        for i, condition in enumerate(conditions):
            spectrum = torch_dsp.stft(mixtures[i // 2][None], DSP.n_fft, DSP.hop)
            log_mel = torch_dsp.log_mel(torch_dsp.resample_2_3(mixtures[i // 2][None]), DSP.front_end)
            wanted = torch_dsp.istft(spectrum * separator(spectrum.abs(), log_mel, condition[None]), DSP.n_fft, DSP.hop, DSP.window_samples)
            assert snr(wanted[0].numpy(), found[i].numpy()) > 90


def test_questions_have_the_papers_proportions_and_consistent_answers():
    random = np.random.default_rng(0)
    kinds = {"P": 0, "N": 0, "PN": 0}
    for _ in range(4000):
        question = ask(random, ("dog", "rain", "siren"), CLASSES)
        kinds[("P" if question.positive else "") + ("N" if question.negative else "")] += 1
        asked = [("dog", "rain", "siren")[i] for i in question.kept]
        assert not set(asked) & set(question.negative)
        assert not question.kept or not question.positive or set(question.positive) == set(asked)
    np.testing.assert_allclose([kinds[k] / 4000 for k in ("P", "N", "PN")], [0.25, 0.25, 0.5], atol=0.03)


def test_mixtures_have_the_wanted_level():
    sources = np.random.default_rng(0).standard_normal((3, 8000)).astype(np.float32)
    mixed = at_snr(sources, [0], 5.0)
    assert snr(mixed[0], mixed.sum(0)) == pytest.approx(5, abs=0.01)


def test_the_loss_is_the_papers_where_it_is_not_capped():
    random = np.random.default_rng(0)
    target, noise = random.standard_normal((2, 1, 8000))
    estimate = target + 0.5 * noise
    t, e = torch.from_numpy(target), torch.from_numpy(estimate)
    wanted = -0.9 * snr(target, estimate) - 0.1 * si_sdr(target, estimate)
    assert float(loss.separation_loss(t, e, t + 1)) == pytest.approx(wanted, abs=0.05)
    silent = torch.zeros_like(t)
    assert float(loss.separation_loss(silent, 0.1 * t, t)) == pytest.approx(-20, abs=0.5)
    assert torch.isfinite(loss.separation_loss(silent, silent, silent))


@needs_espeak
@pytest.mark.slow
def test_all_stages_run_and_write_a_model(tmp_path):
    def run(*args):
        subprocess.run([sys.executable, "-m", *map(str, args)], check=True, cwd=ROOT, timeout=500)

    run("training.pool", "--out", tmp_path, "--clips", 2)
    run("training.pretrain", "--pool", tmp_path, "--minutes", 0.05)
    run("training.train", "--pool", tmp_path, "--out", tmp_path / "out", "--minutes", 0.05)
    clap, checkpoint = (read_checkpoint(tmp_path / "out" / f"demo-{n}.safetensors", n) for n in ("clap", "clapsep"))
    model = open_model(clap, checkpoint)
    assert model.weights == "demo"
    assert "siren" in model.query["words"]
    assert sum(path.stat().st_size for path in (tmp_path / "out").iterdir()) < 12e6
