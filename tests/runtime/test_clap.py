import numpy as np
import torch
from clapsep.export import torch_dsp
from clapsep.runtime.clap import ClapFrontEnd


def test_numpy_and_torch_front_ends_agree(rng):
    x = rng.uniform(-1, 1, (2, 9600)).astype(np.float32)
    front_end = ClapFrontEnd()
    np.testing.assert_allclose(front_end.log_mel(x), torch_dsp.log_mel(torch.from_numpy(x), front_end).numpy(), atol=1e-3)


def test_short_queries_are_repeated_then_filled_with_zeros(rng):
    front_end = ClapFrontEnd(clip_samples=1000)
    x = rng.uniform(-1, 1, 300).astype(np.float32)
    (clip,) = front_end.clips(x, "start", int16=False)
    np.testing.assert_array_equal(clip[:900], np.tile(x, 3))
    np.testing.assert_array_equal(clip[900:], 0)


def test_crop_policies_are_deterministic_and_differ(rng):
    front_end = ClapFrontEnd(clip_samples=1000)
    x = (rng.uniform(-1, 1, 2600) * np.linspace(0.1, 1, 2600)).astype(np.float32)
    np.testing.assert_array_equal(front_end.clips(x, "start", int16=False), x[None, :1000])
    np.testing.assert_array_equal(front_end.clips(x, "center", int16=False), x[None, 800:1800])
    np.testing.assert_array_equal(front_end.clips(x, "loudest", int16=False), x[None, 1600:2600])
    np.testing.assert_array_equal(front_end.clips(x, "average", int16=False), x[:2000].reshape(2, 1000))


def test_int16_round_trip_truncates_towards_zero():
    x = np.array([0.6 / 32767, -0.6 / 32767, 1.7, -1.7], np.float32)
    (clip,) = ClapFrontEnd(clip_samples=4).clips(x, "start", int16=True)
    np.testing.assert_array_equal(clip, np.array([0, 0, 1, -1], np.float32))
