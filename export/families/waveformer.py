"""Waveformer (Veluri et al. 2022, arXiv 2211.02250): its whole-file network, and the same one step at a time as matrix products.

The network carries the checkpoint's own names and is the reference. `Step` is made out of it: frames of channels-last, convolutions as
products and weighted sums of frames, every state an input and an output. The old taps of the layers whose dilation exceeds a step come from
the host's delay lines.
"""

from __future__ import annotations

import math
import re
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from ...runtime.errors import CheckpointError
from ...runtime.families.waveformer import DELAYED, LAYERS, SHORT, WaveformerDsp
from ..checkpoint import WEIGHTS, Checkpoint, Problems, Tensors, shape_of
from ..family import Model
from ..layers import freeze
from ..specs import Cut, Derived, GraphSpec

FAMILY = "waveformer"
DERIVED = "mask_gen.decoder.pos_enc.pe"  # in the files, recomputed here
FIRST = "mask_gen.encoder.dcc_layers.dcc_0.layers.0.weight"
DSP = WaveformerDsp()
HOP, FRAMES = DSP.hop, DSP.step // DSP.hop  # samples of a frame, frames of a step
HEARD = 3 * HOP  # samples that a frame is made of
TAIL = 5  # blocks of `HOP` samples that a frame sounds in
HEADS = 8
# Tensors whose first axis is the encoder's channels.
ENCODER = re.compile(r"^(in_conv|out_conv|label_embedding\.[34]|mask_gen\.encoder|mask_gen\.proj_d2e)\.")

# FSDKaggle2018's classes in the order of the published models, whose files do not hold them.
PUBLISHED = """
    Acoustic_guitar Applause Bark Bass_drum Burping_or_eructation Bus Cello Chime Clarinet Computer_keyboard Cough Cowbell Double_bass
    Drawer_open_or_close Electric_piano Fart Finger_snapping Fireworks Flute Glockenspiel Gong Gunshot_or_gunfire Harmonica Hi-hat
    Keys_jangling Knock Laughter Meow Microwave_oven Oboe Saxophone Scissors Shatter Snare_drum Squeak Tambourine Tearing Telephone
    Trumpet Violin_or_fiddle Writing
"""
LABELS = PUBLISHED.split()


class ChannelNorm(nn.LayerNorm):
    """Normalises the channels of each frame of [B, channels, frames]."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.mT).mT


class DilatedLayer(nn.Module):
    """Depthwise causal convolution of three taps, then a pointwise one, each normalised; added to its input."""

    def __init__(self, size: int, dilation: int) -> None:
        super().__init__()
        self.span = 2 * dilation
        depthwise, pointwise = nn.Conv1d(size, size, 3, dilation=dilation, groups=size), nn.Conv1d(size, size, 1)
        self.layers = nn.Sequential(depthwise, ChannelNorm(size), nn.ReLU(), pointwise, ChannelNorm(size), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(F.pad(x, (self.span, 0)))


class DecoderLayer(nn.Module):
    """Post-norm transformer decoder layer whose queries are the later half of the target's frames."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.self_attn, self.multihead_attn = (nn.MultiheadAttention(size, HEADS, batch_first=True) for _ in range(2))
        self.linear1, self.linear2 = nn.Linear(size, 2 * size), nn.Linear(2 * size, size)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(size) for _ in range(3))

    def forward(self, target: Tensor, memory: Tensor) -> Tensor:
        t = target[:, FRAMES:]
        t = self.norm1(t + self.self_attn(t, target, target, need_weights=False)[0])
        t = self.norm2(t + self.multihead_attn(t, memory, memory, need_weights=False)[0])
        return self.norm3(t + self.linear2(self.linear1(t).relu()))


def positions(size: int) -> Tensor:
    """Sines and cosines of a frame's place among those of two steps, [2 · FRAMES, size]."""
    angles = torch.arange(2 * FRAMES)[:, None] * torch.exp(torch.arange(0, size, 2) * -(math.log(10000) / size))
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)


class MaskGenerator(nn.Module):
    """Encoder, label integration and decoder (paper section 3): frames and a label embedding → mask [B, encoder, frames]."""

    def __init__(self, encoder: int, decoder: int) -> None:
        super().__init__()
        layers = nn.ModuleDict({f"dcc_{i}": DilatedLayer(encoder, 2**i) for i in range(LAYERS)})
        self.encoder = nn.ModuleDict({"dcc_layers": layers})
        self.proj_e2d_e, self.proj_e2d_l = (nn.Sequential(nn.Conv1d(encoder, decoder, 1, groups=decoder), nn.ReLU()) for _ in range(2))
        self.proj_d2e = nn.Sequential(nn.Conv1d(decoder, encoder, 1, groups=decoder), nn.ReLU())
        self.decoder = nn.ModuleDict({"tf_dec_layers": nn.ModuleList([DecoderLayer(decoder)])})

    def dilated(self) -> list[DilatedLayer]:
        return list(self.encoder["dcc_layers"].values())  # pyright: ignore

    def transformer(self) -> DecoderLayer:
        return self.decoder["tf_dec_layers"][0]  # pyright: ignore

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        for layer in self.dilated():
            x = layer(x)
        integrated = label[:, :, None] * x
        target, memory = (self._windows(p) for p in (self.proj_e2d_l(integrated), self.proj_e2d_e(x)))
        decoded = self.transformer()(target, memory).reshape(len(x), -1, target.shape[2])[:, : x.shape[2]]
        return self.proj_d2e(decoded.mT) + integrated

    @staticmethod
    def _windows(x: Tensor) -> Tensor:
        """Each step's frames after those of the step before it: [B, channels, frames] → [B · steps, 2 · FRAMES, channels]."""
        padded = F.pad(x, (FRAMES, -x.shape[2] % FRAMES))
        windows = padded.unfold(2, 2 * FRAMES, FRAMES).permute(0, 2, 3, 1)
        return windows.flatten(0, 1) + positions(x.shape[1])


class Network(nn.Module):
    """Waveform [B, samples] at any length and labels [B, labels] → target [B, samples]."""

    def __init__(self, encoder: int, decoder: int, labels: int, hidden: int) -> None:
        super().__init__()
        self.encoder, self.decoder, self.labels = encoder, decoder, labels
        self.in_conv = nn.Sequential(nn.Conv1d(1, encoder, HEARD, stride=HOP, bias=False), nn.ReLU())
        embedding = [layer for i, o in ((labels, hidden), (hidden, encoder)) for layer in (nn.Linear(i, o), nn.LayerNorm(o), nn.ReLU())]
        self.label_embedding = nn.Sequential(*embedding)
        self.mask_gen = MaskGenerator(encoder, decoder)
        out = nn.ConvTranspose1d(encoder, 1, TAIL * HOP, stride=HOP, padding=(TAIL - 1) * HOP, bias=False)
        self.out_conv = nn.Sequential(out, nn.Tanh())

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        padded = F.pad(x, (HOP, HOP + -x.shape[1] % HOP))
        encoded = self.in_conv(padded[:, None])
        masked = encoded * self.mask_gen(encoded, self.label_embedding(labels))
        return self.out_conv(F.pad(masked, (TAIL - 1, 0)))[:, 0, : x.shape[1]]


class Norm(nn.Module):
    """Layer normalisation with a checkpoint's weights."""

    def __init__(self, tensors: Tensors, name: str) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(tensors[f"{name}.weight"]), nn.Parameter(tensors[f"{name}.bias"])

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias)


class Product(nn.Module):
    """x W + b, from a weight [outputs, inputs]; with a residual r, r + x W + b, in the order that leaves normalisations to themselves.

    ONNX Runtime joins one that follows the sum of two tensors with it, and its joined operator takes twice the time.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.T.contiguous())
        self.bias = None if bias is None else nn.Parameter(bias)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        product = x @ self.weight if residual is None else residual + x @ self.weight
        return product if self.bias is None else product + self.bias


class LabelEmbedding(nn.Sequential):
    """Weights of labels [B, labels] → [B, encoder]."""

    def __init__(self, tensors: Tensors) -> None:
        layers = [[_product(tensors, f"label_embedding.{i}"), Norm(tensors, f"label_embedding.{i + 1}"), nn.ReLU()] for i in (0, 3)]
        super().__init__(*layers[0], *layers[1])


def _product(tensors: Tensors, name: str) -> Product:
    weight = tensors[f"{name}.weight"]
    return Product(weight.flatten(1), tensors[f"{name}.bias"])


class Taps(nn.Module):
    """One dilated layer on a step's frames and those two dilations and one before them, [B, FRAMES, encoder] each."""

    def __init__(self, tensors: Tensors, name: str) -> None:
        super().__init__()
        self.taps, self.bias = nn.Parameter(tensors[f"{name}.0.weight"][:, 0].T.contiguous()), nn.Parameter(tensors[f"{name}.0.bias"])
        self.norm1, self.norm2 = Norm(tensors, f"{name}.1"), Norm(tensors, f"{name}.4")
        self.pointwise = _product(tensors, f"{name}.3")

    def forward(self, oldest: Tensor, older: Tensor, x: Tensor) -> Tensor:
        depthwise = oldest * self.taps[0] + older * self.taps[1] + x * self.taps[2] + self.bias
        return x + self.norm2(self.pointwise(self.norm1(depthwise).relu())).relu()


class Narrow(nn.Module):
    """Grouped projection to the decoder's width: [B, FRAMES, encoder], `regrouped` → [B, FRAMES, decoder]."""

    def __init__(self, tensors: Tensors, name: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(tensors[f"{name}.0.weight"][:, :, 0].T.contiguous())
        self.bias = nn.Parameter(tensors[f"{name}.0.bias"])

    def forward(self, x: Tensor) -> Tensor:
        groups = x.reshape(-1, FRAMES, *self.weight.shape) * self.weight
        return (groups.sum(2) + self.bias).relu()


class Widen(nn.Module):
    """Grouped projection back: [B, FRAMES, decoder] → [B, FRAMES, encoder], `regrouped`."""

    def __init__(self, tensors: Tensors, name: str, size: int) -> None:
        super().__init__()
        self.weight, self.bias = (nn.Parameter(tensors[f"{name}.0.{part}"].reshape(-1, size)) for part in ("weight", "bias"))

    def forward(self, x: Tensor) -> Tensor:
        return (x[:, :, None] * self.weight + self.bias).relu().flatten(2)


class Attention(nn.Module):
    """Attention of FRAMES queries to the frames of two steps, its keys and values apart from its queries.

    The keys' bias adds the same to all scores of a query, which changes nothing; the values' goes through, as weights add up to 1.
    """

    def __init__(self, tensors: Tensors, name: str) -> None:
        super().__init__()
        query, key, value = tensors[f"{name}.in_proj_weight"].chunk(3)
        query_bias, _, value_bias = tensors[f"{name}.in_proj_bias"].chunk(3)
        scale = (len(query) // HEADS) ** -0.5
        self.query, self.key, self.value = Product(query * scale, query_bias * scale), Product(key), Product(value)
        out = tensors[f"{name}.out_proj.weight"]
        self.out = Product(out, tensors[f"{name}.out_proj.bias"] + out @ value_bias)

    @staticmethod
    def _heads(x: Tensor) -> Tensor:
        return x.reshape(-1, x.shape[1], HEADS, x.shape[2] // HEADS)

    def keys(self, x: Tensor) -> Tensor:
        """[B, frames, decoder] → [B, heads, decoder / heads, frames]"""
        return self._heads(self.key(x)).permute(0, 2, 3, 1)

    def values(self, x: Tensor) -> Tensor:
        """[B, frames, decoder] → [B, heads, frames, decoder / heads]"""
        return self._heads(self.value(x)).transpose(1, 2)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """What was attended to, added to x."""
        attended = (self._heads(self.query(x)).transpose(1, 2) @ keys).softmax(-1) @ values
        return self.out(attended.transpose(1, 2).flatten(2), x)


def regrouped(tensors: Tensors, groups: int) -> Tensors:
    """The same model with the first channels of all groups first, then the second ones: sums over groups are then sums of vectors."""
    order = torch.arange(len(tensors["in_conv.0.weight"])).reshape(groups, -1).T.flatten()
    moved = {name: value[order] if ENCODER.search(name) else value for name, value in tensors.items()}
    return moved | {name: value[:, order] for name, value in moved.items() if name.endswith("layers.3.weight")}


class Step(nn.Module):
    """One step of a sound, and the values where it is cut: what does not depend on the labels, and the rest."""

    positions: Tensor

    def __init__(self, tensors: Tensors, decoder: int) -> None:
        super().__init__()
        layer = "mask_gen.decoder.tf_dec_layers.0"
        self.into, self.out = Product(tensors["in_conv.0.weight"][:, 0]), Product(tensors["out_conv.0.weight"][:, 0].T)
        self.encoder = nn.ModuleList(Taps(tensors, f"mask_gen.encoder.dcc_layers.dcc_{i}.layers") for i in range(LAYERS))
        self.narrow_memory, self.narrow_target = Narrow(tensors, "mask_gen.proj_e2d_e"), Narrow(tensors, "mask_gen.proj_e2d_l")
        self.widen = Widen(tensors, "mask_gen.proj_d2e", decoder)
        self.attend_self, self.attend_memory = Attention(tensors, f"{layer}.self_attn"), Attention(tensors, f"{layer}.multihead_attn")
        self.linear1, self.linear2 = _product(tensors, f"{layer}.linear1"), _product(tensors, f"{layer}.linear2")
        self.norm1, self.norm2, self.norm3 = (Norm(tensors, f"{layer}.norm{i}") for i in (1, 2, 3))
        self.register_buffer("positions", positions(decoder), persistent=False)

    def forward(
        self, x: Tensor, valid: Tensor, film: Tensor, dec_mem: Tensor, dec_tgt: Tensor, out_buf: Tensor,
        ctx0: Tensor, ctx1: Tensor, ctx2: Tensor, ctx3: Tensor,
        tap0_4: Tensor, tap1_4: Tensor, tap0_5: Tensor, tap1_5: Tensor, tap0_6: Tensor, tap1_6: Tensor,
        tap0_7: Tensor, tap1_7: Tensor, tap0_8: Tensor, tap1_8: Tensor, tap0_9: Tensor, tap1_9: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        taps = [(tap0_4, tap1_4), (tap0_5, tap1_5), (tap0_6, tap1_6), (tap0_7, tap1_7), (tap0_8, tap1_8), (tap0_9, tap1_9)]
        blocks = x.reshape(-1, FRAMES + 2, HOP)
        z0 = self.into(torch.cat([blocks[:, i : i + FRAMES] for i in range(3)], dim=2)).relu()
        e, contexts, inputs = self._encode(z0, (ctx0, ctx1, ctx2, ctx3), taps)
        memory = self.narrow_memory(e) * valid
        seen = torch.cat([dec_mem, memory], dim=1) + self.positions
        keys, values = self.attend_memory.keys(seen), self.attend_memory.values(seen)
        integrated = film[:, None] * e
        target = self.narrow_target(integrated) * valid
        mask = self.widen(self._decode(torch.cat([dec_tgt, target], dim=1), keys, values)) + integrated
        masked = torch.cat([out_buf, z0 * mask], dim=1)
        y = self._sound(masked)
        return (y, memory, target, masked[:, FRAMES:], *contexts, *inputs, z0, e, keys, values)

    def _encode(
        self, x: Tensor, contexts: tuple[Tensor, ...], taps: list[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """The encoder's output, the contexts of its short layers after this step, and the inputs of its long ones."""
        after, inputs = [], []
        for i, layer in enumerate(self.encoder):
            if i < SHORT:
                seen = torch.cat([contexts[i], x], dim=1)
                after.append(seen[:, FRAMES:])
                x = layer(seen[:, :FRAMES], seen[:, 2**i : 2**i + FRAMES], x)
            else:
                inputs.append(x)
                x = layer(*taps[i - SHORT], x)
        return x, after, inputs

    def _decode(self, target: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        heard = target + self.positions
        t = heard[:, FRAMES:]
        t = self.norm1(self.attend_self(t, self.attend_self.keys(heard), self.attend_self.values(heard)))
        t = self.norm2(self.attend_memory(t, keys, values))
        return self.norm3(self.linear2(self.linear1(t).relu(), t))

    def _sound(self, masked: Tensor) -> Tensor:
        """Frames of this step and the last of the one before → its samples, [B, FRAMES · HOP]."""
        parts = self.out(masked).split(HOP, dim=2)
        shifted = [part[:, TAIL - 1 - i : TAIL - 1 - i + FRAMES] for i, part in enumerate(parts)]
        return (shifted[0] + shifted[1] + shifted[2] + shifted[3] + shifted[4]).tanh().flatten(1)


def recognises(checkpoint: Checkpoint) -> bool:
    return "in_conv.0.weight" in checkpoint.tensors and FIRST in checkpoint.tensors


def _sizes(tensors: Tensors) -> tuple[int, int, int, int]:
    """Encoder and decoder width, number of labels, width of the label network."""
    encoder, decoder = (shape_of(tensors, name, 3)[0] for name in ("in_conv.0.weight", "mask_gen.proj_e2d_e.0.weight"))
    hidden, labels = shape_of(tensors, "label_embedding.0.weight", 2)
    if encoder % decoder or decoder % HEADS:
        raise CheckpointError(f"the checkpoint's widths {encoder} and {decoder} do not make a Waveformer; give a published file")
    return encoder, decoder, labels, hidden


def load(checkpoint: Checkpoint) -> Network:
    """The network with a checkpoint's weights.

    Raises:
        CheckpointError: one message that lists every missing, surplus, mis-shaped or non-finite tensor.
    """
    with torch.device("meta"):
        network = Network(*_sizes(checkpoint.tensors))
    problems, expected = Problems(), network.state_dict()
    taken: Tensors = problems.take(checkpoint.tensors, expected, "")
    problems.surplus([name for name in checkpoint.tensors if name not in expected and name != DERIVED])
    problems.raise_if_any("the checkpoint")
    network.load_state_dict(taken, assign=True)
    return network


def _labels(metadata: dict[str, Any], count: int) -> list[str]:
    """Names of the labels, from the file if it has them."""
    labels = metadata.get("labels", LABELS if count == len(LABELS) else None)
    if labels is None:
        raise CheckpointError(f"the checkpoint knows {count} labels, whose names its metadata must list as labels; write it again")
    whole = isinstance(labels, list) and len(labels) == count and all(isinstance(name, str) and name.strip() for name in labels)
    if not whole or len(set(labels)) < count or any(mark in name for name in labels for mark in ",+"):
        raise CheckpointError(f"the checkpoint's metadata must have {count} different labels, without , and +; write it again")
    return labels


class WaveformerModel(Model):
    """A Waveformer checkpoint, ready to be exported."""

    family = FAMILY

    def __init__(self, network: Network, labels: list[str], weights: str) -> None:
        self.network, self.weights, self.encoder, self.decoder = freeze(network), weights, network.encoder, network.decoder
        tensors = regrouped(network.state_dict(), self.decoder)
        self.labels, self.step = freeze(LabelEmbedding(tensors)), freeze(Step(tensors, self.decoder))
        self.variant = {"encoder": self.encoder, "decoder": self.decoder}
        self.dsp, self.condition, self.query = asdict(DSP), {"size": len(labels)}, {"labels": labels}

    def graphs(self) -> list[GraphSpec]:
        labels = torch.rand(2, self.condition["size"])
        states = ("dec_mem_out", "dec_tgt_out", "out_buf_out", *(f"ctx{i}_out" for i in range(SHORT)), *(f"in_{i}" for i in DELAYED))
        return [
            GraphSpec("film", self.labels, {"condition": labels}, ("film",)),  # pyright: ignore
            GraphSpec("separator", self.step, self._example(), ("y", *states), ("z0", "e", "keys", "values")),
        ]

    def derived(self) -> list[Derived]:
        contexts = [f"ctx{i}" for i in range(SHORT)]
        taps = [f"tap{k}_{i}" for i in DELAYED for k in range(2)]
        inputs, passed = [f"in_{i}" for i in DELAYED], ("z0", "e", "keys", "values")
        states = ("dec_mem_out", *(f"{name}_out" for name in contexts), *inputs)
        return [
            Cut("mixture_encoder", "separator", ("x", "valid", "dec_mem", *contexts, *taps), (*passed, *states)),
            Cut("mask_decoder", "separator", (*passed, "valid", "film", "dec_tgt", "out_buf"), ("y", "dec_tgt_out", "out_buf_out")),
        ]

    def _example(self) -> dict[str, Tensor]:
        """One array for each input: the exporter takes equal ones for one."""
        e, d = self.encoder, self.decoder
        shapes = {"x": (HOP * (FRAMES + 2),), "valid": (FRAMES, 1), "film": (e,), "dec_mem": (FRAMES, d), "dec_tgt": (FRAMES, d)}
        contexts = {f"ctx{i}": (2 * 2**i, e) for i in range(SHORT)}
        taps = {f"tap{k}_{i}": (FRAMES, e) for i in DELAYED for k in range(2)}
        return {name: torch.rand(2, *shape) for name, shape in {**shapes, "out_buf": (TAIL - 1, e), **contexts, **taps}.items()}

    def conditions(self) -> NDArray[np.float32]:
        """One label, the same with another, and a third: [3, labels]."""
        rows = np.zeros((3, self.condition["size"]), np.float32)
        for row, wanted in zip(rows, ((2,), (2, 10), (9,)), strict=True):
            row[[i % len(row) for i in wanted]] = 1
        return rows

    @torch.inference_mode()
    def separate(self, mixture: NDArray[np.float32], condition: NDArray[np.float32]) -> NDArray[np.float32]:
        """The whole sound at once."""
        return self.network(torch.from_numpy(mixture), torch.from_numpy(condition).expand(len(mixture), -1)).numpy()


def open_model(clap: Checkpoint | None, checkpoint: Checkpoint) -> WaveformerModel:
    """Read a Waveformer out of its file.

    Raises:
        CheckpointError: the file does not fit the model, or a CLAP checkpoint came with it.
    """
    if clap is not None:
        raise CheckpointError(f"--checkpoint {checkpoint.source.name} is a Waveformer, which is asked by labels; leave --clap out")
    if unknown := checkpoint.metadata.keys() - {"labels", "weights"}:
        raise CheckpointError(f"the checkpoint's metadata has {', '.join(sorted(unknown))}; it may set labels and weights")
    weights = checkpoint.metadata.get("weights", WEIGHTS[0])
    if weights not in WEIGHTS:
        raise CheckpointError(f"the checkpoint's metadata must have weights of {', '.join(WEIGHTS)}; write it again")
    network = load(checkpoint)
    return WaveformerModel(network, _labels(checkpoint.metadata, network.labels), weights)
