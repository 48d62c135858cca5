"""ResUNet30 (AudioSep, USS): the network under its published names, its checkpoints, and the graphs that they become.

A U-Net of six levels on the magnitude (arXiv 2308.05037, section III): residual blocks of pre-activations, each of which adds a linear
function of the condition between normalisation and LeakyReLU. A network has two lives: as loaded it computes what was published, which
is the reference; `folded` makes out of it what goes into graphs.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from ...runtime.clap import ClapFrontEnd
from ...runtime.errors import CheckpointError
from ...runtime.families.resunet30 import CLAP_SIZE, FLOOR, MAPS, ResunetDsp
from .. import torch_dsp
from ..checkpoint import DERIVED, About, Checkpoint, Problems, Tensors, about, shape_of
from ..clap import Towers, clap_config, useful
from ..family import Model
from ..layers import LastAxisBatchNorm
from ..specs import Derived, GraphSpec
from ..waveform import from_waveform

FAMILY = "resunet30"
LEVELS = 6
POOLS = ((2, 2), (2, 2), (2, 2), (2, 2), (2, 2), (1, 2))  # time, frequency
ROWS = 32  # frames are filled up to a multiple of this: the product of the pools in time
SLOPE, EPS = 0.01, 1e-5
ANCHOR = "base.encoder_block1.conv_block1.conv1.weight"
FIRST_FILM = "film.encoder_block1->conv_block1->beta1.weight"
DEAD = re.compile(r"^base\.decoder_block\d\.bn2\.|^film\.decoder_block\d->beta2\.")  # in the files, used by nothing
CLAP_INSIDE = "query_encoder.model."
SHORT = 32  # tokens: nearly every caption fits, and the published context takes half a second

# Sizes that tensor shapes do not tell, with the published values; a safetensors file may set them in its metadata.
HYPER = {"window_samples": ResunetDsp.window_samples, "spec_size": 256, "context": 512, "text_head_dim": 64}
LIMITS = {"window_samples": 10_000_000, "spec_size": 4096, "context": 4096, "text_head_dim": 4096}


class Activation(nn.Module):
    """LeakyReLU(BN(x) + beta): x [B, C, t, f], beta [B, C, 1, 1] → like x. BN in eval form."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(size)), nn.Parameter(torch.zeros(size))
        self.register_buffer("running_mean", torch.zeros(size))
        self.register_buffer("running_var", torch.ones(size))
        self.folded, self.scale = False, None

    def forward(self, x: Tensor, beta: Tensor) -> Tensor:
        if not self.folded:
            x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=EPS)
        elif self.scale is not None:
            x = x * self.scale
        return F.leaky_relu(x + beta, SLOPE)

    def fold(self, *before: nn.Conv2d) -> Tensor:
        """Scale by the convolutions that make x, if nothing else reads it; returns the shift [C], which belongs into beta from then on."""
        scale = self.weight.double() / (self.running_var.double() + EPS).sqrt()
        for conv in before:
            conv.weight.copy_(conv.weight * scale[:, None, None, None])
            if conv.bias is not None:
                conv.bias.copy_(conv.bias * scale)
        self.folded, self.scale = True, None if before else scale.float()[:, None, None]
        return (self.bias - self.running_mean * scale).float()


class ConvBlock(nn.Module):
    """Two pre-activated 3x3 convolutions and a shortcut: [B, ci, t, f] → [B, co, t, f]; takes two betas."""

    def __init__(self, ci: int, co: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = Activation(ci), nn.Conv2d(ci, co, 3, padding=1, bias=False)
        self.bn2, self.conv2 = Activation(co), nn.Conv2d(co, co, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(ci, co, 1) if ci != co else nn.Identity()

    def forward(self, x: Tensor, betas: Iterator[Tensor]) -> Tensor:
        y = self.conv1(self.bn1(x, next(betas)))
        return self.conv2(self.bn2(y, next(betas))) + self.shortcut(x)


class Encoder(nn.Module):
    def __init__(self, ci: int, co: int) -> None:
        super().__init__()
        self.conv_block1 = ConvBlock(ci, co)

    def forward(self, x: Tensor, betas: Iterator[Tensor]) -> Tensor:
        return self.conv_block1(x, betas)


class Decoder(nn.Module):
    """Up-sampling by `pool`, joined with the skip: [B, ci, t, f] → [B, co, t · pool, f · pool]; takes three betas."""

    def __init__(self, ci: int, co: int, pool: tuple[int, int]) -> None:
        super().__init__()
        self.bn1, self.conv1 = Activation(ci), nn.ConvTranspose2d(ci, co, pool, pool, bias=False)
        self.conv_block2 = ConvBlock(2 * co, co)

    def forward(self, x: Tensor, skip: Tensor, betas: Iterator[Tensor]) -> Tensor:
        up = self.conv1(self.bn1(x, next(betas)))
        return self.conv_block2(torch.cat([up, skip], dim=1), betas)


class ResUnet(nn.Module):
    """magnitude [B, n, bins], film [B or 1, sum of the activations' sizes] → mask, mask_cos, mask_sin [B, n, bins]; any number n of frames.

    widths: channels before the first encoder and after each of them. The highest bin is not looked at and its maps are 0.5, 0 and 0,
    so that nothing of it remains.
    """

    def __init__(self, bins: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.bn0, self.pre_conv = LastAxisBatchNorm(bins), nn.Conv2d(1, widths[0], 1)
        for i, (ci, co) in enumerate(pairwise(widths), 1):
            self.add_module(f"encoder_block{i}", Encoder(ci, co))
        self.conv_block7a = Encoder(widths[-1], widths[-1])
        sources = [widths[-1], *reversed(widths[2:])]  # a decoder has the width of its skip
        for i, (ci, co, pool) in enumerate(zip(sources, reversed(widths[1:]), reversed(POOLS), strict=True), 1):
            self.add_module(f"decoder_block{i}", Decoder(ci, co, pool))
        self.after_conv = nn.Conv2d(widths[1], len(MAPS), 1)

    @property
    def encoders(self) -> list[Encoder]:
        return [getattr(self, f"encoder_block{i}") for i in range(1, LEVELS + 1)]

    @property
    def decoders(self) -> list[Decoder]:
        return [getattr(self, f"decoder_block{i}") for i in range(1, LEVELS + 1)]

    @property
    def activations(self) -> dict[str, Activation]:
        """In the order of their use, by their names in `Film`."""
        modules = self.named_modules()
        return {name.replace(".", "->").replace("bn", "beta"): m for name, m in modules if isinstance(m, Activation)}

    def forward(self, magnitude: Tensor, film: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        sizes = [len(activation.bias) for activation in self.activations.values()]
        betas = iter(film[:, :, None, None].split(sizes, dim=1))
        frames = magnitude.shape[1]
        normal = F.pad(self.bn0(magnitude)[:, :, :-1], (0, 0, 0, -frames % ROWS))
        x, skips = self.pre_conv(normal[:, None]), []
        for encoder, pool in zip(self.encoders, POOLS, strict=True):
            skips.append(encoder(x, betas))
            x = F.avg_pool2d(skips[-1], pool)
        x = self.conv_block7a(x, betas)
        for decoder in self.decoders:
            x = decoder(x, skips.pop(), betas)
        mask, real, imag = F.pad(self.after_conv(x)[:, :, :frames], (0, 1)).unbind(1)
        real, imag = real.tanh(), imag.tanh()
        size = (real.square() + imag.square()).sqrt().clamp_min(1e-10)
        return mask.sigmoid(), real / size, imag / size

    def fold(self) -> Tensor:
        """Normalisations become scales, most of them of convolutions; returns all shifts, which belong into `film` from then on."""
        self.bn0.fold()
        blocks = (module for module in self.modules() if isinstance(module, ConvBlock))
        before: dict[nn.Module, list[nn.Module]] = {block.bn2: [block.conv1] for block in blocks}
        for previous, decoder in pairwise(self.decoders):
            before[decoder.bn1] = [previous.conv_block2.conv2, previous.conv_block2.shortcut]
        return torch.cat([a.fold(*before.get(a, ())) for a in self.activations.values()])  # pyright: ignore[reportArgumentType]


class Film(nn.ModuleDict):
    """Condition [B, size] → beta of every activation, side by side [B, sum of sizes]; paper section III-B."""

    def __init__(self, size: int, sizes: Mapping[str, int]) -> None:
        super().__init__({name: nn.Linear(size, width) for name, width in sizes.items()})

    def forward(self, condition: Tensor) -> Tensor:
        return torch.cat([linear(condition) for linear in self.values()], dim=-1)

    def merged(self, shifts: Tensor) -> nn.Linear:
        """One product instead of many, with `shifts` added."""
        parts: list[nn.Linear] = list(self.values())  # pyright: ignore[reportAssignmentType]
        linear = nn.Linear(parts[0].in_features, len(shifts))
        linear.weight = nn.Parameter(torch.cat([part.weight for part in parts]))
        linear.bias = nn.Parameter(torch.cat([part.bias for part in parts]) + shifts)
        return linear


class Adaptor(nn.Module):
    """What USS may have between PANNs and FiLM: [B, size] → [B, condition]."""

    def __init__(self, size: int, hidden: int, condition: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(size, hidden), nn.Linear(hidden, condition)

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.fc2(F.leaky_relu(self.fc1(x), SLOPE)), SLOPE)


class Sizes(NamedTuple):
    """Bins, widths as in `ResUnet`, condition, and of an adaptor its input and hidden layer."""

    bins: int
    widths: tuple[int, ...]
    condition: int
    adaptor: tuple[int, int] | None = None

    @property
    def query(self) -> int:
        """Length of what is asked with."""
        return self.adaptor[0] if self.adaptor else self.condition


class Network(nn.Module):
    """A checkpoint's network as published: magnitude [B, n, bins], condition [B or 1, size] → as `ResUnet`."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.base = ResUnet(sizes.bins, sizes.widths)
        self.film = Film(sizes.condition, {name: len(activation.bias) for name, activation in self.base.activations.items()})
        self.query_net = Adaptor(*sizes.adaptor, sizes.condition) if sizes.adaptor else nn.Identity()

    def forward(self, magnitude: Tensor, condition: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.base(magnitude, self.film(self.query_net(condition)))

    @torch.no_grad()
    def folded(self) -> tuple[nn.Module, ResUnet]:
        """The same in two modules with less to compute: condition → film, and magnitude and film → maps."""
        own = copy.deepcopy(self)
        film: nn.Module = own.film.merged(own.base.fold())
        if isinstance(own.query_net, Adaptor):
            film = nn.Sequential(own.query_net, film)
        return film.eval().requires_grad_(False), own.base


class ResunetModel(Model):
    """A network, folded, ready to be exported, and as published to compare with."""

    family = FAMILY

    def __init__(self, network: Network, dsp: ResunetDsp, towers: Towers | None = None, described: About | None = None) -> None:
        described = described or About()
        self.network, self.signal, self.towers, self.weights = network.eval().requires_grad_(False), dsp, towers, described.weights
        self.film, self.separator = network.folded()
        sizes = network.sizes
        self.size = sizes.query
        self.variant = {"adaptor": sizes.adaptor is not None}
        self.dsp = asdict(dsp)
        self.condition = {"size": self.size, "normalize": towers is not None}
        self.query = {}
        if towers is not None:
            towers.freeze()
            self.query = towers.query if described.words is None else {**towers.query, "words": described.words}

    def graphs(self) -> list[GraphSpec]:
        condition = torch.from_numpy(self.conditions()[:2])
        inputs = {"magnitude": self._example_map(), "film": self.film(condition)}
        return [
            GraphSpec("separator", self.separator, inputs, MAPS),
            GraphSpec("film", self.film, {"condition": condition}, ("film",)),
        ]

    def derived(self) -> list[Derived]:
        dsp = self.signal
        return [from_waveform(dsp.window_samples, dsp.n_fft, dsp.hop, MAPS, floor=FLOOR)]

    def _example_map(self) -> Tensor:
        return torch.rand(2, self.signal.frames, self.signal.bins)

    def conditions(self) -> NDArray[np.float32]:
        """Three vectors [3, size] of length 1, with nothing negative: CLAP's have that length, PANNs' that sign."""
        rows = np.random.Generator(np.random.PCG64(30)).random((3, self.size))
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)

    @torch.inference_mode()
    def separate(self, mixture: NDArray[np.float32], condition: NDArray[np.float32]) -> NDArray[np.float32]:
        """Any length from n_fft / 2 + 1 samples on, by the published order of operations."""
        x, dsp = torch.from_numpy(mixture), self.signal
        spectrum = torch_dsp.stft(x, dsp.n_fft, dsp.hop)
        magnitude = (spectrum.real.square() + spectrum.imag.square()).clamp_min(FLOOR**2).sqrt()
        mask, cos, sin = self.network(magnitude, torch.from_numpy(condition)[None])
        target = (magnitude * mask) * (spectrum / magnitude * torch.complex(cos, sin))
        return torch_dsp.istft(target, dsp.n_fft, dsp.hop, x.shape[1]).numpy()


def _prefix(checkpoint: Checkpoint) -> str | None:
    """What stands before `base.` and `film.` in a checkpoint's names, None if it is of another family."""
    found = [name.removesuffix(ANCHOR) for name, value in checkpoint.tensors.items() if name.endswith(ANCHOR) and value.ndim == 4]
    return min((prefix for prefix in found if f"{prefix}{FIRST_FILM}" in checkpoint.tensors), key=len, default=None)


def recognises(checkpoint: Checkpoint) -> bool:
    return _prefix(checkpoint) is not None


def _own_tensors(checkpoint: Checkpoint, prefix: str) -> Tensors:
    """The network's tensors under the names of `Network`; towers, detectors and transforms that files also hold are left out."""
    places = {f"{prefix}base.": "base.", f"{prefix}film.": "film.", f"{prefix.removesuffix('ss_model.')}query_net.fc": "query_net.fc"}
    found = {
        own + name.removeprefix(place): value
        for place, own in places.items()
        for name, value in checkpoint.tensors.items()
        if name.startswith(place)
    }
    return {name: value for name, value in found.items() if not DERIVED.search(name) and not DEAD.search(name)}


def _sizes(tensors: Tensors) -> Sizes:
    encoders = (f"base.encoder_block{i}.conv_block1.conv1.weight" for i in range(1, LEVELS + 1))
    widths = [shape_of(tensors, name, 4)[0] for name in ("base.pre_conv.weight", *encoders)]
    bins, condition = shape_of(tensors, "base.bn0.weight", 1)[0], shape_of(tensors, FIRST_FILM, 2)[1]
    if not any(name.startswith("query_net.") for name in tensors):
        return Sizes(bins, tuple(widths), condition)
    hidden, size = shape_of(tensors, "query_net.fc1.weight", 2)
    return Sizes(bins, tuple(widths), condition, (size, hidden))


def load_network(checkpoint: Checkpoint) -> Network:
    """The network with a checkpoint's tensors.

    Raises:
        CheckpointError: one message that lists every missing, surplus, mis-shaped or impossible tensor.
    """
    prefix = _prefix(checkpoint)
    if prefix is None:
        name = checkpoint.source.name
        raise CheckpointError(f"--checkpoint {name} has no {ANCHOR} with {FIRST_FILM}; give an AudioSep or USS checkpoint")
    tensors = _own_tensors(checkpoint, prefix)
    with torch.device("meta"):
        network = Network(_sizes(tensors))
    expected, problems = network.state_dict(), Problems()
    taken = problems.take(tensors, expected, "")
    problems.surplus([name for name in tensors if name not in expected])
    problems.raise_if_any("the checkpoint")
    network.load_state_dict(taken, assign=True)
    return network


def _hyper_parameters(*metadata: Mapping[str, Any]) -> dict[str, int]:
    """The sizes that shapes do not tell, from the files' metadata where it has them; others are refused."""
    values = dict(HYPER)
    for key, value in (item for m in metadata for item in m.items()):
        if key in About.__dataclass_fields__:
            continue
        if type(value) is not int or not 0 < value <= LIMITS.get(key, 0):
            raise CheckpointError(f"the checkpoint's metadata has {key} = {value!r}; it may set {', '.join(HYPER)}, up to {LIMITS}")
        values[key] = value
    return values


def _clap_tensors(clap: Checkpoint | None, checkpoint: Checkpoint) -> Tensors:
    """CLAP's tensors: those that a training checkpoint holds, or --clap's; none if there are none."""
    mark = f"{CLAP_INSIDE}text_branch."
    outer = next((name[: name.index(mark)] for name in checkpoint.tensors if mark in name), None)
    if outer is None:
        return useful({name.removeprefix("module."): value for name, value in clap.tensors.items()}) if clap is not None else {}
    if clap is not None:
        raise CheckpointError(f"--checkpoint {checkpoint.source.name} holds the CLAP that it was trained with; leave --clap out")
    place = outer + CLAP_INSIDE
    return useful({name.removeprefix(place): value for name, value in checkpoint.tensors.items() if name.startswith(place)})


def _towers(tensors: Tensors, hyper: Mapping[str, int], condition: int) -> Towers:
    problems, config = Problems(), clap_config(tensors, hyper)
    if config.embedding != condition:
        raise CheckpointError(f"the model takes {condition} numbers as its condition and CLAP gives {config.embedding}; leave --clap out")
    towers = Towers(config, tensors, ClapFrontEnd(), problems, int16=False, short=SHORT)
    problems.raise_if_any("CLAP")
    return towers


def open_model(clap: Checkpoint | None, checkpoint: Checkpoint) -> ResunetModel:
    """Read a ResUNet30 out of its files, with its query towers if it was trained with CLAP.

    Raises:
        CheckpointError: the files are wrong or do not fit the model, or a model that is asked through CLAP comes without it.
    """
    metadata = [c.metadata for c in (clap, checkpoint) if c is not None]
    hyper, described = _hyper_parameters(*metadata), about(*metadata)
    network, tensors = load_network(checkpoint), _clap_tensors(clap, checkpoint)
    if not tensors and network.sizes.query == CLAP_SIZE:
        raise CheckpointError(f"--checkpoint {checkpoint.source.name} holds no CLAP towers; give the CLAP checkpoint with --clap")
    try:
        dsp = ResunetDsp(window_samples=hyper["window_samples"], n_fft=2 * (network.sizes.bins - 1))
        towers = _towers(tensors, hyper, network.sizes.query) if tensors else None
    except (ValueError, RuntimeError, ZeroDivisionError) as error:
        raise CheckpointError(f"the checkpoint's sizes do not make a model ({error}); give the published files") from error
    return ResunetModel(network, dsp, towers, described)
