"""CLAPSep: what its checkpoints look like, and the three graphs that they become."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ...runtime.errors import CheckpointError
from ...runtime.families.clapsep import ClapsepDsp
from .. import torch_dsp
from ..checkpoint import DERIVED, Checkpoint, Problems, Tensors
from ..clap import AudioEncoder, ClapConfig, TextConfig, TextEncoder
from ..clapsep import BackEnd, FrontEnd, RotatingBackEnd, Separator, SeparatorConfig, SeparatorInParts
from ..family import Cut, Derived, GraphSpec, Model, Variant, Wrap
from ..htsat import HtsatConfig
from ..layers import freeze, merge_lora

FAMILY = "clapsep"
SHORT = 16  # tokens: most captions fit, and a quarter of the full context takes a quarter of the time
TUNED = re.compile(r"^audio_branch\..*(\.lora_[AB]|\.attn\.(qkv|proj)\.bias)$")

# In the files, not in the model: CLAP's classifier and the transforms that retrieval uses.
UNUSED = re.compile(r"^(audio_branch\.(tscam_conv|head)\.|(text|audio)_transform\.|logit_scale_[at]$|sink)")
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


WEIGHTS = ("checkpoint", "demo", "generated")


@dataclass(frozen=True)
class About:
    """Where weights come from, and the words that a small model was trained on (None: a full vocabulary)."""

    weights: str = "checkpoint"
    words: list[str] | None = None


@dataclass(frozen=True)
class Parts:
    """Tensors of a checkpoint pair without prefixes: CLAP's, and the separator's own."""

    clap: Tensors
    separator: Tensors


def _without(prefix: str, tensors: Mapping[str, Tensor]) -> Tensors:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _useful(tensors: Mapping[str, Tensor]) -> Tensors:
    return {name: value for name, value in tensors.items() if not DERIVED.search(name) and not UNUSED.search(name)}


def looks_like(tensors: Iterable[str]) -> str:
    """What a set of tensor names is, in words."""
    names = [name.removeprefix("module.") for name in tensors]

    def has(prefix: str) -> bool:
        return any(name.startswith(prefix) for name in names)

    if has("decoder_model."):
        return "a raw CLAPSep training checkpoint" if has("clap_model.model.text_branch.") else "a CLAPSep checkpoint"
    if has("ss_model.") or has("base.encoder_block1."):
        return "an AudioSep or USS checkpoint"
    if has("text_branch.") and has("audio_branch."):
        return "a CLAP checkpoint with feature fusion" if has("audio_branch.patch_embed.fusion") else "a CLAP checkpoint"
    if has("roberta.") or has("encoder.layer.") or has("embeddings."):
        return "a RoBERTa checkpoint"
    return "no checkpoint that is known here"


def recognises(checkpoint: Checkpoint) -> bool:
    return any(name.startswith("decoder_model.") for name in checkpoint.tensors)


def _expect(checkpoint: Checkpoint, kinds: tuple[str, ...], flag: str) -> None:
    seen = looks_like(checkpoint.tensors)
    if seen not in kinds:
        other = {"a CLAP checkpoint": "--clap", "a CLAPSep checkpoint": "--checkpoint"}.get(seen)
        hint = f"give it as {other}" if other else "see the README for the published files"
        raise CheckpointError(f"--{flag} {checkpoint.source.name} looks like {seen}, not like {kinds[0]}; {hint}")


def split(clap: Checkpoint | None, checkpoint: Checkpoint) -> Parts:
    """Tell CLAP's tensors and the separator's apart and check that the two files belong together.

    Raises:
        CheckpointError: a file is not what its flag says, --clap is needed and missing, or the separator was trained on
            another CLAP than the one given.
    """
    _expect(checkpoint, ("a CLAPSep checkpoint", "a raw CLAPSep training checkpoint"), "checkpoint")
    inside = _useful(_without(CLAP_INSIDE, checkpoint.tensors))
    separator = _useful({n: v for n, v in checkpoint.tensors.items() if not n.startswith(CLAP_INSIDE)})
    if clap is None:
        if looks_like(checkpoint.tensors) != "a raw CLAPSep training checkpoint":
            raise CheckpointError(f"--checkpoint {checkpoint.source.name} holds no CLAP towers; give the CLAP checkpoint with --clap")
        return Parts(inside, separator)
    _expect(clap, ("a CLAP checkpoint",), "clap")
    outside = _useful({name.removeprefix("module."): value for name, value in clap.tensors.items()})
    differing = [n for n, v in inside.items() if n not in outside or v.shape != outside[n].shape or not torch.equal(v, outside[n])]
    if differing:
        raise CheckpointError(
            f"--checkpoint {checkpoint.source.name} was trained on another CLAP than --clap {clap.source.name}: "
            f"{len(differing)} tensors that both files hold differ, {differing[0]} first; give the CLAP it was trained on"
        )
    return Parts(outside, separator)


def _shape(tensors: Mapping[str, Tensor], name: str, rank: int) -> tuple[int, ...]:
    value = tensors.get(name)
    if value is None or value.ndim != rank or 0 in value.shape:
        seen = "is missing" if value is None else f"has shape {list(value.shape)}"
        raise CheckpointError(f"the checkpoint does not fit the model: {name} {seen}; give the published files")
    return tuple(value.shape)


def _count(tensors: Iterable[str], prefix: str) -> int:
    """Length of the module list `prefix`, by the highest index that appears."""
    indices = [int(m.group(1)) for name in tensors if (m := re.match(re.escape(prefix) + r"\.(\d{1,3})\.", name))]
    return max(indices, default=-1) + 1


def _audio_config(clap: Tensors, spec_size: int) -> HtsatConfig:
    embed, _, patch, _ = _shape(clap, "audio_branch.patch_embed.proj.weight", 4)
    stages = range(_count(clap, "audio_branch.layers"))
    tables = [_shape(clap, f"audio_branch.layers.{i}.blocks.0.attn.relative_position_bias_table", 2) for i in stages]
    hidden, _ = _shape(clap, "audio_branch.layers.0.blocks.0.mlp.fc1.weight", 2)
    return HtsatConfig(
        spec_size=spec_size,
        n_mels=_shape(clap, "audio_branch.bn0.weight", 1)[0],
        patch=patch,
        embed=embed,
        depths=tuple(_count(clap, f"audio_branch.layers.{i}.blocks") for i in stages),
        heads=tuple(heads for _, heads in tables),
        window=(round(tables[0][0] ** 0.5) + 1) // 2,
        mlp_ratio=hidden // embed,
    )


def _text_config(clap: Tensors, context: int, head_dim: int) -> TextConfig:
    vocab, hidden = _shape(clap, "text_branch.embeddings.word_embeddings.weight", 2)
    return TextConfig(
        vocab=vocab,
        hidden=hidden,
        layers=_count(clap, "text_branch.encoder.layer"),
        heads=hidden // head_dim,
        ffn=_shape(clap, "text_branch.encoder.layer.0.intermediate.dense.weight", 2)[0],
        positions=_shape(clap, "text_branch.embeddings.position_embeddings.weight", 2)[0],
        context=context,
    )


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


def about(*metadata: Mapping[str, Any]) -> About:
    """What the files' metadata say of the weights; the last file that speaks counts."""
    described = About()
    for m in metadata:
        described = About(m.get("weights", described.weights), m.get("words", described.words))
        words = described.words
        if described.weights not in WEIGHTS or not (words is None or (isinstance(words, list) and all(isinstance(w, str) for w in words))):
            kinds = ", ".join(WEIGHTS)
            raise CheckpointError(f"the checkpoint's metadata must have weights of {kinds} and a list of words; write it again")
    return described


def infer_config(parts: Parts, hyper: Mapping[str, Any]) -> SeparatorConfig:
    """Sizes of the model, from the shapes of its tensors and the hyper-parameters that shapes do not tell."""
    own = parts.separator
    clap = ClapConfig(
        text=_text_config(parts.clap, hyper["context"], hyper["text_head_dim"]),
        audio=_audio_config(parts.clap, hyper["spec_size"]),
        embedding=_shape(parts.clap, "text_projection.2.weight", 2)[0],
    )
    bins = _shape(own, "decoder_model.spec_norm.weight", 1)[0]
    layers = "decoder_model.mask_net.2.layers"
    conv = own.get(f"{layers}.0.conv.weight")
    lora = own.get("audio_branch.layers.0.blocks.0.attn.qkv.lora_A")
    return SeparatorConfig(
        clap=clap,
        depths=tuple(_count(own, f"decoder_model.layers.{i}.blocks") for i in range(_count(own, "decoder_model.layers"))),
        bins=bins,
        attention=_shape(own, "decoder_model.mask_net.0.weight", 2)[0],
        mask_layers=_count(own, layers),
        mask_heads=hyper["mask_heads"],
        mask_ffn=SeparatorConfig.mask_ffn if conv is not None else _shape(own, f"{layers}.0.linear1.weight", 2)[0],
        mask_net="transformer" if conv is None else "conv",
        mask_kernel=SeparatorConfig.mask_kernel if conv is None else conv.shape[-1],
        phase=_shape(own, "decoder_model.mask_net.3.weight", 2)[0] == 3 * bins,
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


def load_modules(parts: Parts, config: SeparatorConfig, dsp: ClapsepDsp) -> tuple[TextEncoder, AudioEncoder, Separator]:
    """The three networks with their weights, LoRA unmerged.

    Raises:
        CheckpointError: one message that lists every missing, surplus, mis-shaped or non-finite tensor.
    """
    text, audio = TextEncoder(config.clap), AudioEncoder(config.clap, dsp.frames)
    separator = Separator(config)
    problems = Problems()
    own = separator_tensors(parts)
    for module, tensors, where in (
        (text, parts.clap, "CLAP: "),
        (audio, parts.clap, "CLAP: "),
        (separator, own, "separator: "),
    ):
        taken = problems.take(tensors, module.state_dict(), where)
        if not problems.lines:
            module.load_state_dict(taken)
    known = {**text.state_dict(), **audio.state_dict()}
    problems.surplus([f"CLAP: {name}" for name in parts.clap if name not in known])
    problems.surplus([f"separator: {name}" for name in own if name not in separator.state_dict()])
    problems.raise_if_any("the checkpoint")
    return text, audio, separator


class ClapsepModel(Model):
    """A CLAPSep checkpoint with LoRA merged and constants folded, ready to be exported."""

    family = FAMILY

    def __init__(
        self, text: TextEncoder, audio: AudioEncoder, separator: Separator, config: SeparatorConfig, dsp: ClapsepDsp, described: About
    ) -> None:
        self.config, self.signal, self.weights = config, dsp, described.weights
        for module in (text, audio, separator):
            freeze(merge_lora(module))
        self.text, self.audio, self.separator = text, audio, separator
        self.vocabulary = config.clap.text.vocab
        self.variant = {"phase": config.phase, "mask_net": config.mask_net, "lora_rank": config.lora_rank}
        self.dsp = asdict(dsp)
        self.condition = {"embedding_size": config.clap.embedding, "size": config.condition, "normalize": True}
        self.query = {"context": config.clap.text.context, "crop": "start", "int16_round_trip": True}
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
        return [
            self._text_encoder(self.config.clap.text.context),
            GraphSpec("audio_encoder", self.audio, {"log_mel": log_mel}, ("embedding",)),
            GraphSpec("separator", parts, inputs, self.maps, ("film", *self.features)),
        ]

    def derived(self) -> list[Derived]:
        mixture = torch.randn(2, self.signal.window_samples)
        back = RotatingBackEnd(self.signal) if self.config.phase else BackEnd(self.signal)
        before = GraphSpec("before", FrontEnd(self.signal), {"mixture": mixture}, ("magnitude", "log_mel", "bins"))
        bins = torch.randn(2, 2, 2, self.signal.frames, (self.signal.bins + 1) // 2)
        after = GraphSpec("after", back, {**{name: self._example_map() for name in self.maps}, "bins": bins}, ("target",))
        short = [Variant("text_encoder_short", "text_encoder", self._text_encoder(SHORT))]
        return [
            *(short if self.config.clap.text.context > SHORT else []),
            Cut("mixture_encoder", "separator", ("magnitude", "log_mel"), self.features),
            Cut("film", "separator", ("condition",), ("film",)),
            Cut("mask_decoder", "separator", (*self.features, "film"), self.maps),
            Wrap("separator_waveform", "separator", before, after),
        ]

    def _text_encoder(self, context: int) -> GraphSpec:
        ids = torch.full((2, context), 1, dtype=torch.int64)
        ids[:, :3] = torch.tensor([0, 5, 2])
        return GraphSpec("text_encoder", self.text, {"input_ids": ids, "attention_mask": (ids != 1).long()}, ("embedding",))

    def _example_map(self) -> Tensor:
        return torch.rand(2, self.signal.frames, self.signal.bins)

    @torch.inference_mode()
    def query_features(self, clip: NDArray[np.float32]) -> NDArray[np.float32]:
        front_end = self.signal.front_end
        x = (torch.from_numpy(clip).clamp(-1, 1) * 32767).to(torch.int16).float() / 32767
        repeated = x.repeat(front_end.clip_samples // len(x))
        filled = nn.functional.pad(repeated, (0, front_end.clip_samples - len(repeated)))
        return torch_dsp.log_mel(filled[None].double(), front_end)[0].float().numpy()

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
        if dsp.frames > config.clap.audio.frames:
            raise ValueError(f"{dsp.frames} frames do not fit into the encoder's {config.clap.audio.frames}")
        modules = load_modules(parts, config, dsp)
    except (ValueError, RuntimeError, ZeroDivisionError) as error:
        raise CheckpointError(f"the checkpoint's sizes do not make a model ({error}); give the published files") from error
    return ClapsepModel(*modules, config, dsp, described)
