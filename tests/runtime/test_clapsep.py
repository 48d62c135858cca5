import gc
import threading
import tracemalloc
import weakref

import numpy as np
import pytest
from clapsep.runtime.clap import ClapFrontEnd
from clapsep.runtime.families.clapsep import ClapsepDsp
from clapsep.runtime.family import open_family
from clapsep.runtime.metrics import snr
from clapsep.runtime.resampler import resample_2_3

PHASE = ("mask", "mask_cos", "mask_sin")
BUFFERS = 150_000  # bytes that numpy itself needs while it adds strided arrays; a block of frames is 1 MiB


@pytest.fixture
def family(separator):
    return separator.family


def windows(family, count, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (count, family.window_samples)).astype(np.float32)


def random_maps(context, names=("mask",)):
    random = np.random.default_rng(1)
    return {name: random.uniform(-1, 1, context.shape).astype(np.float32) for name in names}


def spectra(x, n_fft, hop):
    frames = np.lib.stride_tricks.sliding_window_view(np.pad(x, n_fft // 2, mode="reflect"), n_fft)[::hop]
    return np.fft.rfft(frames * (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n_fft) / n_fft)))


def waveform(spectrum, n_fft, hop, length):
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n_fft) / n_fft)
    total, power = np.zeros((2, (len(spectrum) - 1) * hop + n_fft))
    for t, frame in enumerate(np.fft.irfft(spectrum, n_fft)):
        total[t * hop : t * hop + n_fft] += frame * window
        power[t * hop : t * hop + n_fft] += window**2
    return (total / power.clip(1e-11))[n_fft // 2 :][:length]


def test_the_whole_path_is_within_125_db_of_float64(family):
    dsp, x = family.dsp, windows(family, 2)
    features, context = family.features(x)
    for names in (("mask",), PHASE):
        maps = random_maps(context, names)
        found = family.reconstruct(maps, context)
        assert (found.dtype, found.shape) == (np.float32, x.shape)
        for row in range(2):
            exact = spectra(x[row].astype(np.float64), dsp.n_fft, dsp.hop)
            assert snr(np.abs(exact), features["magnitude"][row]) > 125
            turn = maps["mask_cos"][row] + 1j * maps["mask_sin"][row].astype(np.float64) if len(names) > 1 else 1
            assert snr(waveform(exact * maps["mask"][row] * turn, dsp.n_fft, dsp.hop, x.shape[1]), found[row]) > 125


def test_log_mel_is_that_of_the_resampled_window(family):
    x = windows(family, 2)
    features, _ = family.features(x)
    assert [features[name].dtype for name in ("magnitude", "log_mel")] == [np.float32, np.float32]
    np.testing.assert_array_equal(features["log_mel"], family.towers.front_end.log_mel(resample_2_3(x)))


def test_a_mask_of_ones_gives_the_mixture_back(family):
    x = windows(family, 1)
    _, context = family.features(x)
    assert snr(x, family.reconstruct({"mask": np.ones(context.shape, np.float32)}, context)) > 130


def test_threads_share_one_family_and_get_the_same_bits(family):
    def work(seed):
        features, context = family.features(windows(family, 1, seed))
        return features["magnitude"], features["log_mel"], context, family.reconstruct(random_maps(context, PHASE), context)

    wanted = [work(seed) for seed in range(6)]
    found, start = {}, threading.Barrier(6)

    def repeat(seed):
        start.wait()
        found[seed] = [work(seed) for _ in range(5)]

    threads = [threading.Thread(target=repeat, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(6):
        for results in found[seed]:
            assert all(np.array_equal(a, b) for a, b in zip(wanted[seed], results, strict=True))


def peak(call):
    """Bytes that were allocated at once, beyond what there was before, and what `call` returned."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        result = call()
        return tracemalloc.get_traced_memory()[1] - before, result
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("names", [("mask",), PHASE])
@pytest.mark.parametrize("count", [1, 3])
def test_a_second_window_allocates_nothing_but_its_outputs(family, count, names):
    x = windows(family, count)
    family.reconstruct(random_maps(family.features(x)[1], names), family.features(x)[1])
    used, (features, context) = peak(lambda: family.features(x))
    outputs = features["magnitude"].nbytes + features["log_mel"].nbytes + context.nbytes
    assert outputs <= used < outputs + BUFFERS
    maps = random_maps(context, names)
    used, target = peak(lambda: family.reconstruct(maps, context))
    assert target.nbytes <= used < target.nbytes + BUFFERS


def test_a_family_and_its_memory_go_at_once(separator):
    family = open_family(separator.bundle.manifest)
    family.reconstruct(random_maps(family.features(windows(family, 1))[1]), family.features(windows(family, 1))[1])
    watched = [
        weakref.ref(thing) for thing in (family, family._stft, family._stft._forward_scratch, family.towers.front_end._transform.stft)
    ]
    gc.disable()
    try:
        del family
        assert [ref() for ref in watched] == [None] * 4
    finally:
        gc.enable()


def test_a_mel_transform_longer_than_the_window_is_refused():
    assert ClapsepDsp(window_samples=2000, mel_n_fft=2048).front_end == ClapFrontEnd(clip_samples=3000, n_fft=2048)
    with pytest.raises(ValueError, match="do not fit together"):
        ClapsepDsp(window_samples=2000, mel_n_fft=4096)
