"""CLAPSep: what its checkpoints look like, and the three graphs that they become."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...runtime.errors import CheckpointError
from ...runtime.families.clapsep import ClapsepDsp
from .. import torch_dsp
from ..checkpoint import About, Checkpoint, Problems, Tensors, about, count_of, shape_of
from ..clap import Towers, clap_config, useful
from ..clapsep import MelFrontEnd, Separator, SeparatorConfig, SeparatorInParts
from ..family import Model
from ..layers import freeze, merge_lora
from ..specs import Cut, Derived, GraphSpec
from ..waveform import from_waveform

FAMILY = "clapsep"
SHORT = 16  # tokens: most captions fit, and a quarter of the full context takes a quarter of the time
TUNED = re.compile(r"^audio_branch\..*(\.lora_[AB]|\.attn\.(qkv|proj)\.bias)$")

CLAP_INSIDE = "clap_model.model."

# Sizes that tensor shapes do not tell, with the published values; a safetensors file may set them in its metadata.
HYPER: dict[str, int | float] = {
    "spec_size": 256,
    "window_samples": 320000,
    "context": 77,
    "text_head_dim": 64,
    "mask_heads": 8,
    "lora_alpha": 1.0,
}


@dataclass(frozen=True)
class Parts:
    """Tensors of a checkpoint pair without prefixes: CLAP's, and the separator's own."""

    clap: Tensors
    separator: Tensors


def _without(prefix: str, tensors: Mapping[str, Tensor]) -> Tensors:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def recognises(checkpoint: Checkpoint) -> bool:
    return any(name.startswith("decoder_model.") for name in checkpoint.tensors)


def split(clap: Checkpoint | None, checkpoint: Checkpoint) -> Parts:
    """Tell CLAP's tensors and the separator's apart and check that the two files belong together.

    Raises:
        CheckpointError: --clap is needed and missing, or the separator was trained on
            another CLAP than the one given.
    """
    inside = useful(_without(CLAP_INSIDE, checkpoint.tensors))
    separator = useful({n: v for n, v in checkpoint.tensors.items() if not n.startswith(CLAP_INSIDE)})
    if clap is None:
        if not any(name.startswith("text_branch.") for name in inside):
            raise CheckpointError(f"--checkpoint {checkpoint.source.name} holds no CLAP towers; give the CLAP checkpoint with --clap")
        return Parts(inside, separator)
    outside = useful({name.removeprefix("module."): value for name, value in clap.tensors.items()})
    differing = [n for n, v in inside.items() if n not in outside or v.shape != outside[n].shape or not torch.equal(v, outside[n])]
    if differing:
        raise CheckpointError(
            f"--checkpoint {checkpoint.source.name} was trained on another CLAP than --clap {clap.source.name}: "
            f"{len(differing)} tensors that both files hold differ, {differing[0]} first; give the CLAP it was trained on"
        )
    return Parts(outside, separator)


def hyper_parameters(*metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes that shapes do not tell, from the files' metadata where it has them; others are refused."""
    values = dict(HYPER)
    for key, value in (item for m in metadata for item in m.items()):
        if key in About.__dataclass_fields__:
            continue
        if key not in HYPER or type(value) not in (int, float) or not 0 < value < 1e7:
            raise CheckpointError(
                f"the checkpoint's metadata has {key} = {value!r}; it may set {', '.join(HYPER)} to numbers from 0 to 1e7"
            )
        values[key] = type(HYPER[key])(value)
    return values


def describe_sizes(config: SeparatorConfig, dsp: ClapsepDsp) -> dict[str, int | float]:
    """What a safetensors file must say in its metadata about a model of other than the published sizes; see `hyper_parameters`."""
    text = config.clap.text
    return {
        "spec_size": config.clap.audio.spec_size,
        "window_samples": dsp.window_samples,
        "context": text.context,
        "text_head_dim": text.hidden // text.heads,
        "mask_heads": config.mask_heads,
        "lora_alpha": config.lora_alpha,
    }


def infer_config(parts: Parts, hyper: Mapping[str, Any]) -> SeparatorConfig:
    """Sizes of the model, from the shapes of its tensors and the hyper-parameters that shapes do not tell."""
    own = parts.separator
    bins = shape_of(own, "decoder_model.spec_norm.weight", 1)[0]
    layers = "decoder_model.mask_net.2.layers"
    conv = own.get(f"{layers}.0.conv.weight")
    lora = own.get("audio_branch.layers.0.blocks.0.attn.qkv.lora_A")
    return SeparatorConfig(
        clap=clap_config(parts.clap, hyper),
        depths=tuple(count_of(own, f"decoder_model.layers.{i}.blocks") for i in range(count_of(own, "decoder_model.layers"))),
        bins=bins,
        attention=shape_of(own, "decoder_model.mask_net.0.weight", 2)[0],
        mask_layers=count_of(own, layers),
        mask_heads=hyper["mask_heads"],
        mask_ffn=SeparatorConfig.mask_ffn if conv is not None else shape_of(own, f"{layers}.0.linear1.weight", 2)[0],
        mask_net="transformer" if conv is None else "conv",
        mask_kernel=SeparatorConfig.mask_kernel if conv is None else conv.shape[-1],
        phase=shape_of(own, "decoder_model.mask_net.3.weight", 2)[0] == 3 * bins,
        lora_rank=0 if lora is None else lora.shape[0],
        lora_alpha=hyper["lora_alpha"],
    )


def separator_tensors(parts: Parts) -> Tensors:
    """The separator's state: CLAP's audio branch, overlaid with what was tuned, and the decoder."""
    base = {
        name: value for name, value in parts.clap.items() if name.startswith("audio_branch.") and not name.startswith("audio_branch.norm.")
    }
    own = {name: value for name, value in parts.separator.items() if not name.startswith("audio_branch.norm.")}
    return {**base, **own}


def load_modules(parts: Parts, config: SeparatorConfig, dsp: ClapsepDsp) -> tuple[Towers, Separator]:
    """The networks with their weights, LoRA unmerged.

    Raises:
        CheckpointError: one message that lists every missing, surplus, mis-shaped or non-finite tensor.
    """
    problems, own = Problems(), separator_tensors(parts)
    towers = Towers(config.clap, parts.clap, dsp.front_end, problems, int16=True, short=SHORT)
    separator = Separator(config)
    taken = problems.take(own, separator.state_dict(), "separator: ")
    problems.surplus([f"separator: {name}" for name in own if name not in separator.state_dict()])
    problems.raise_if_any("the checkpoint")
    separator.load_state_dict(taken)
    return towers, separator


class ClapsepModel(Model):
    """A CLAPSep checkpoint with LoRA merged and constants folded, ready to be exported."""

    family = FAMILY

    def __init__(self, towers: Towers, separator: Separator, config: SeparatorConfig, dsp: ClapsepDsp, described: About) -> None:
        self.config, self.signal, self.weights = config, dsp, described.weights
        towers.freeze()
        freeze(merge_lora(separator))
        self.towers, self.separator = towers, separator
        self.variant = {"phase": config.phase, "mask_net": config.mask_net, "lora_rank": config.lora_rank}
        self.dsp = asdict(dsp)
        self.condition = {"embedding_size": config.clap.embedding, "size": config.condition, "normalize": True}
        self.query = towers.query
        if described.words is not None:
            self.query["words"] = described.words

    @property
    def maps(self) -> tuple[str, ...]:
        return ("mask", "mask_cos", "mask_sin") if self.config.phase else ("mask",)

    @property
    def features(self) -> tuple[str, ...]:
        """Names of what the mask decoder takes from the mixture: one value for each FiLM, coarsest first, and the spectrum."""
        return (*(f"feature_{i}" for i in range(len(self.separator.decoder_model.films))), "spectrum")

    def graphs(self) -> list[GraphSpec]:
        log_mel = torch.rand(2, self.signal.frames, self.signal.n_mels) * 60 - 80
        inputs = {"magnitude": self._example_map(), "log_mel": log_mel, "condition": torch.randn(2, self.config.condition)}
        parts = SeparatorInParts(self.separator)
        return [GraphSpec("separator", parts, inputs, self.maps, ("film", *self.features))]

    def derived(self) -> list[Derived]:
        dsp = self.signal
        mixture = {"mixture": torch.randn(2, dsp.window_samples)}
        front = GraphSpec("before", MelFrontEnd(dsp), mixture, ("magnitude", "log_mel", "bins"))
        return [
            Cut("mixture_encoder", "separator", ("magnitude", "log_mel"), self.features),
            Cut("film", "separator", ("condition",), ("film",)),
            Cut("mask_decoder", "separator", (*self.features, "film"), self.maps),
            from_waveform(dsp.window_samples, dsp.n_fft, dsp.hop, self.maps, front),
        ]

    def _example_map(self) -> Tensor:
        return torch.rand(2, self.signal.frames, self.signal.bins)

    @torch.inference_mode()
    def separate(self, mixture: NDArray[np.float32], condition: NDArray[np.float32]) -> NDArray[np.float32]:
        """Any length from n_fft / 2 + 1 samples to the encoder's rows: the modules take fewer frames than the graphs do."""
        x, dsp = torch.from_numpy(mixture), self.signal
        spectrum = torch_dsp.stft(x, dsp.n_fft, dsp.hop)
        log_mel = torch_dsp.log_mel(torch_dsp.resample_2_3(x), dsp.front_end)
        maps = self.separator(spectrum.abs(), log_mel, torch.from_numpy(condition).expand(len(x), -1))
        mask = maps[0] * torch.complex(maps[1], maps[2]) if self.config.phase else maps
        return torch_dsp.istft(spectrum * mask, dsp.n_fft, dsp.hop, x.shape[1]).numpy()


def open_model(clap: Checkpoint | None, checkpoint: Checkpoint) -> ClapsepModel:
    """Read a CLAPSep model out of its files.

    Raises:
        CheckpointError: the files are wrong, do not belong together, or do not fit the model.
    """
    parts = split(clap, checkpoint)
    metadata = [c.metadata for c in (clap, checkpoint) if c is not None]
    hyper, described = hyper_parameters(*metadata), about(*metadata)
    if hyper["spec_size"] > 4096 or hyper["context"] > 4096:
        raise CheckpointError(f"the checkpoint's metadata asks for a model beyond reason ({hyper}); give the published files")
    try:
        config = infer_config(parts, hyper)
        dsp = ClapsepDsp(window_samples=hyper["window_samples"], n_fft=2 * (config.bins - 1), n_mels=config.clap.audio.n_mels)
        modules = load_modules(parts, config, dsp)
    except (ValueError, RuntimeError, ZeroDivisionError) as error:
        raise CheckpointError(f"the checkpoint's sizes do not make a model ({error}); give the published files") from error
    return ClapsepModel(*modules, config, dsp, described)
