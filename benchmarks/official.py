"""CLAPSep as the official project runs it in PyTorch eager, wave to wave: the baseline that everything else is measured against.

Ma et al. 2024, arXiv 2402.17455. Written from a description of the computation, without the official code, which has no licence. The
work is meant to be the same, neither more nor less: STFTs as convolutions, LoRA unfolded, windows cut and rolled on the grid, position
biases gathered at each call, and outputs that nobody uses. Run it under `torch.inference_mode()`, as the official code is.

Usage from another script: `text, audio, separator = read_official(clap_path, checkpoint_path)`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import torch
from clapsep.export.checkpoint import DERIVED, read_checkpoint
from clapsep.export.clap import PAD, UNUSED, ClapConfig, TextConfig
from clapsep.export.clapsep import SILENCE_DB, SeparatorConfig
from clapsep.export.families.clapsep import Parts, hyper_parameters, infer_config, split
from clapsep.export.graph import OPSET
from clapsep.export.htsat import HtsatConfig
from clapsep.runtime.clap import ClapFrontEnd
from clapsep.runtime.families.clapsep import ClapsepDsp
from clapsep.runtime.metrics import snr
from official_audio import AudioBranch, Istft, LoRALinear, Resampler, Stft, SwinBlock, magphase
from torch import Tensor, nn
from torch.nn import functional as F


class FilmCoefficients(nn.Module):
    """Condition [B, c] → gamma and beta [B, dim]."""

    def __init__(self, condition: int, dim: int) -> None:
        super().__init__()
        self.beta, self.gamma = nn.Linear(condition, dim), nn.Linear(condition, dim)

    def forward(self, u: Tensor, condition: Tensor) -> Tensor:
        return self.gamma(condition).unsqueeze(1) * u + self.beta(condition).unsqueeze(1)


class SkipTrans(nn.Module):
    """LN(gamma(c) · Linear(z) + beta(c) [+ h]): z, h [B, tokens, dim], c [B, condition]."""

    def __init__(self, condition: int, dim: int) -> None:
        super().__init__()
        self.skip_conv = FilmCoefficients(condition, dim)
        self.feature_proj, self.norm = nn.Linear(dim, dim), nn.LayerNorm(dim)

    def forward(self, z: Tensor, condition: Tensor, h: Tensor | None = None) -> Tensor:
        u = self.skip_conv(self.feature_proj(z), condition)
        return self.norm(u if h is None else u + h)


class PatchExpand(nn.Module):
    """[B, grid², C] → [B, 4 grid², C / 2]: the quarter i + 2 j of the doubled channels goes to the rows 2 h + i, columns 2 w + j."""

    def __init__(self, dim: int, grid: int) -> None:
        super().__init__()
        self.grid = grid
        self.expand, self.norm = nn.Linear(dim, 2 * dim, bias=False), nn.LayerNorm(dim // 2)

    def forward(self, x: Tensor) -> Tensor:
        batch, _, dim = x.shape
        quarters = self.expand(x).view(batch, self.grid, self.grid, 2 * dim).chunk(4, dim=-1)
        out = x.new_zeros(batch, 2 * self.grid, 2 * self.grid, dim // 2)
        for part, quarter in enumerate(quarters):
            out[:, part % 2 :: 2, part // 2 :: 2] = quarter
        return self.norm(out.view(batch, -1, dim // 2))


class DecoderStage(nn.Module):
    def __init__(self, config: HtsatConfig, stage: int, depth: int) -> None:
        super().__init__()
        coarsest = stage == len(config.depths) - 1
        self.downsample = None if coarsest else PatchExpand(config.dim(stage + 1), config.grid(stage + 1))
        self.blocks = nn.ModuleList(SwinBlock(config, stage, j) for j in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.downsample is None else self.downsample(x)
        for block in self.blocks:
            x, _ = block(x)
        return x


class InversePatchEmbed(nn.Module):
    """[B, grid², embed] → image [B, 1, spec_size, spec_size] → rows [B, frames, n_mels]."""

    def __init__(self, config: HtsatConfig) -> None:
        super().__init__()
        self.grid, self.ratio = config.grid(0), config.spec_size // config.n_mels
        self.norm = nn.LayerNorm(config.embed)
        self.proj = nn.ConvTranspose2d(config.embed, 1, config.patch, config.patch)

    def forward(self, x: Tensor) -> Tensor:
        batch, _, dim = x.shape
        image = self.proj(self.norm(x).transpose(1, 2).reshape(batch, dim, self.grid, self.grid))
        rows, size = image.shape[2] // self.ratio, image.shape[3]
        return image.reshape(batch, self.ratio, rows, size).permute(0, 1, 3, 2).reshape(batch, self.ratio * size, rows)


class Decoder(nn.Module):
    """Features F0 … F4, magnitude [B, 1, n, bins] and condition [B, c] → mask logits [B, 1, n, bins]."""

    def __init__(self, config: SeparatorConfig) -> None:
        super().__init__()
        audio, dim = config.clap.audio, config.attention
        coarse_first = range(len(audio.depths) - 1, -1, -1)
        self.film = SkipTrans(config.condition, audio.dim(len(audio.depths) - 1))
        self.layers = nn.ModuleList(DecoderStage(audio, s, d) for s, d in zip(coarse_first, config.depths, strict=True))
        self.skip = nn.ModuleList(SkipTrans(config.condition, audio.dim(s)) for s in coarse_first)
        self.inverse_patch_embed = InversePatchEmbed(audio)
        self.spec_norm = nn.BatchNorm2d(config.bins)
        layer = nn.TransformerEncoderLayer(dim, config.mask_heads, config.mask_ffn, dropout=0.0, batch_first=True)
        encoder = nn.TransformerEncoder(layer, config.mask_layers)
        self.mask_net = nn.Sequential(nn.Linear(config.bins + audio.n_mels, dim), nn.LayerNorm(dim), encoder, nn.Linear(dim, config.bins))

    def forward(self, features: list[Tensor], magnitude: Tensor, condition: Tensor) -> Tensor:
        h = self.film(features[-1], condition)
        for layer, skip, feature in zip(self.layers, self.skip, reversed(features[:-1]), strict=True):
            h = skip(feature, condition, layer(h))
        rows = self.inverse_patch_embed(h)[:, : magnitude.shape[2]]
        normed = self.spec_norm(magnitude.transpose(1, 3)).transpose(1, 3).squeeze(1)
        return self.mask_net(torch.cat([normed, rows], dim=-1)).unsqueeze(1)


class OfficialSeparator(nn.Module):
    """Mixture [B, L] at 32 kHz, 512 < L < 327680, and condition [B, 2 · embedding] → target [B, L].

    `stft`, `resampler`, `audio_branch`, `decoder_model` and `istft` can be timed on their own.
    """

    def __init__(self, config: SeparatorConfig, dsp: ClapsepDsp) -> None:
        super().__init__()
        if config.phase or config.mask_net != "transformer":
            raise ValueError(f"the official path is written for the published variant, not for {config}")
        self.stft, self.istft = Stft(dsp.n_fft, dsp.hop), Istft(dsp.n_fft, dsp.hop)
        self.resampler = Resampler()
        self.audio_branch = AudioBranch(config.clap.audio, dsp.front_end, config.lora_rank, config.lora_alpha)
        self.decoder_model = Decoder(config)

    def features(self, mixture: Tensor) -> list[Tensor]:
        """Mixture [B, L] at 32 kHz → F0 … F4 of the tuned encoder, with its front end."""
        branch = self.audio_branch
        return branch.encode(branch.log_mel(self.resampler(mixture), pad=True)).features

    def forward(self, mixture: Tensor, condition: Tensor) -> Tensor:
        magnitude, cosine, sine = magphase(*self.stft(mixture))
        mask = self.decoder_model(self.features(mixture), magnitude, condition).sigmoid()
        masked = F.relu(mask * magnitude)
        return self.istft(masked * cosine, masked * sine, mixture.shape[1])

    def network(self, magnitude: Tensor, log_mel: Tensor, condition: Tensor) -> Tensor:
        """Magnitude [B, n, bins], log-mel in dB [B, n, n_mels], condition → mask [B, n, bins]: what our separator graph computes."""
        rows = self.audio_branch.config.frames - log_mel.shape[1]
        padded = F.pad(log_mel.unsqueeze(1), (0, 0, 0, rows), value=SILENCE_DB)
        features = self.audio_branch.encode(padded).features
        return self.decoder_model(features, magnitude.unsqueeze(1), condition).sigmoid().squeeze(1)


def _projection(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, outputs), nn.ReLU(), nn.Linear(outputs, outputs))


class OfficialAudioEncoder(nn.Module):
    """Query clip [B, 480000] at 48 kHz → audio embedding [B, embedding], unit norm."""

    def __init__(self, config: ClapConfig, front_end: ClapFrontEnd) -> None:
        super().__init__()
        self.audio_branch = AudioBranch(config.audio, front_end)
        self.audio_projection = _projection(config.audio.dim(len(config.audio.depths) - 1), config.embedding)

    def forward(self, waveform: Tensor) -> Tensor:
        return self._embed(self.audio_branch.log_mel(waveform, pad=False))

    def network(self, log_mel: Tensor) -> Tensor:
        """Log-mel in dB [B, frames, n_mels] → embedding: what our audio encoder's graph computes."""
        return self._embed(log_mel.unsqueeze(1))

    def _embed(self, log_mel: Tensor) -> Tensor:
        return F.normalize(self.audio_projection(self.audio_branch.encode(log_mel).embedding), dim=-1)


class RobertaEmbeddings(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab, config.hidden)
        self.token_type_embeddings = nn.Embedding(1, config.hidden)
        self.position_embeddings = nn.Embedding(config.positions, config.hidden)
        self.LayerNorm = nn.LayerNorm(config.hidden)

    def forward(self, ids: Tensor) -> Tensor:
        real = ids.ne(PAD).int()
        positions = (torch.cumsum(real, dim=1) * real).long() + PAD
        summed = self.word_embeddings(ids) + self.token_type_embeddings(torch.zeros_like(ids)) + self.position_embeddings(positions)
        return self.LayerNorm(summed)


class SelfAttention(nn.Module):
    """RoBERTa's attention over [B, n, hidden] with an additive mask [B, 1, 1, n]: three products for query, key and value."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.heads, self.size = config.heads, config.hidden // config.heads
        self.query, self.key, self.value = (nn.Linear(config.hidden, config.hidden) for _ in range(3))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        query, key, value = (
            part(x).view(*x.shape[:2], self.heads, self.size).permute(0, 2, 1, 3) for part in (self.query, self.key, self.value)
        )
        scores = query @ key.transpose(-1, -2) / math.sqrt(self.size) + mask
        return (scores.softmax(dim=-1) @ value).permute(0, 2, 1, 3).contiguous().view(x.shape)


class DenseNorm(nn.Module):
    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.dense, self.LayerNorm = nn.Linear(inputs, hidden), nn.LayerNorm(hidden)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dense(x) + residual)


class RobertaLayer(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.attention = nn.ModuleDict({"self": SelfAttention(config), "output": DenseNorm(config.hidden, config.hidden)})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(config.hidden, config.ffn)})
        self.output = DenseNorm(config.ffn, config.hidden)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.attention["output"](self.attention["self"](x, mask), x)
        return self.output(F.gelu(self.intermediate["dense"](x)), x)


class TextBranch(nn.Module):
    """RoBERTa up to the pooler, every layer over all tokens: ids and mask [B, context] → [B, hidden]."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.embeddings = RobertaEmbeddings(config)
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(RobertaLayer(config) for _ in range(config.layers))})
        self.pooler = nn.ModuleDict({"dense": nn.Linear(config.hidden, config.hidden)})

    def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embeddings(ids)
        mask = (1.0 - attention_mask[:, None, None, :].to(x.dtype)) * torch.finfo(x.dtype).min
        for layer in self.encoder["layer"]:
            x = layer(x, mask)
        return self.pooler["dense"](x[:, 0]).tanh()


class OfficialTextEncoder(nn.Module):
    """input_ids, attention_mask int64 [B, context] → text embedding [B, embedding], unit norm."""

    def __init__(self, config: ClapConfig) -> None:
        super().__init__()
        self.text_branch = TextBranch(config.text)
        self.text_projection = _projection(config.text.hidden, config.embedding)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return F.normalize(self.text_projection(self.text_branch(input_ids, attention_mask)), dim=-1)


class Official(NamedTuple):
    text: OfficialTextEncoder
    audio: OfficialAudioEncoder
    separator: OfficialSeparator


def _load(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Take the published tensors by name; only derived buffers and the unused classifier, which stays random, may be missing."""
    own = module.state_dict()
    missing, _ = module.load_state_dict({name: value for name, value in tensors.items() if name in own}, strict=False)
    lacking = [name for name in missing if not DERIVED.search(name) and not UNUSED.search(name)]
    if lacking:
        raise ValueError(f"the checkpoint lacks {len(lacking)} tensors of {type(module).__name__}, {lacking[0]} first")
    module.eval().requires_grad_(False)


def official(parts: Parts, config: SeparatorConfig, dsp: ClapsepDsp) -> Official:
    """The three networks with the parameters of a checkpoint pair as `split` tells them apart, LoRA unfolded."""
    made = Official(OfficialTextEncoder(config.clap), OfficialAudioEncoder(config.clap, dsp.front_end), OfficialSeparator(config, dsp))
    branch = {name: value for name, value in parts.clap.items() if name.startswith("audio_branch.")}
    _load(made.text, parts.clap)
    _load(made.audio, parts.clap)
    _load(made.separator, {**branch, **parts.separator})
    return made


def read_official(clap: str | Path, checkpoint: str | Path) -> Official:
    """The same from two files in the published layouts."""
    files = read_checkpoint(clap, "clap"), read_checkpoint(checkpoint, "checkpoint")
    parts = split(*files)
    hyper = hyper_parameters(*(file.metadata for file in files))
    config = infer_config(parts, hyper)
    dsp = ClapsepDsp(window_samples=hyper["window_samples"], n_fft=2 * (config.bins - 1), n_mels=config.clap.audio.n_mels)
    return official(parts, config, dsp)


class Network(nn.Module):
    """`OfficialSeparator.network` as a forward, for the exporter."""

    def __init__(self, separator: OfficialSeparator) -> None:
        super().__init__()
        self.separator = separator

    def forward(self, magnitude: Tensor, log_mel: Tensor, condition: Tensor) -> Tensor:
        return self.separator.network(magnitude, log_mel, condition)


def _example(separator: OfficialSeparator, frames: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    decoder, mels = separator.decoder_model, separator.audio_branch.config.n_mels
    return {
        "magnitude": torch.rand(1, frames, decoder.spec_norm.num_features, generator=random) * 4,
        "log_mel": torch.rand(1, frames, mels, generator=random) * 60 - 80,
        "condition": F.normalize(torch.randn(1, decoder.film.skip_conv.gamma.in_features, generator=random)),
    }


def naive_export(separator: OfficialSeparator, path: Path, frames: int) -> int:
    """What somebody gets who exports the network as it is: `torch.onnx.export(dynamo=True)`, batch 1; returns the number of nodes.

    LoRA is merged by plain addition, because loralib merges when the official wrapper is set to eval; `separator` stays unfolded.
    Outputs that nobody uses vanish in tracing.

    Raises:
        ValueError: ONNX Runtime's mask is not that of PyTorch eager with LoRA unfolded, to 100 dB.
    """
    import onnxruntime

    merged = copy.deepcopy(separator)
    for module in merged.modules():
        if isinstance(module, LoRALinear):
            module.merge()
    inputs = _example(separator, frames)
    with torch.inference_mode():
        wanted = separator.network(**inputs).numpy()
    torch.onnx.export(
        Network(merged).eval(),
        tuple(inputs.values()),
        path,
        dynamo=True,
        opset_version=OPSET,
        input_names=list(inputs),
        output_names=["mask"],
        external_data=True,
        verbose=False,
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    if not (agreement := snr(wanted, np.asarray(found))) >= 100:
        raise ValueError(f"the naive graph's mask is at {agreement:.1f} dB of PyTorch eager")
    return len(onnx.load(path, load_external_data=False).graph.node)
