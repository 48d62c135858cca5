"""Stage 2, the separator on a frozen CLAP: python -m training.train --pool FOLDER --out FOLDER --minutes M."""

from __future__ import annotations

import argparse
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from clapsep.export import torch_dsp
from clapsep.export.clap import AudioEncoder, TextEncoder
from clapsep.export.clapsep import Separator
from clapsep.export.demo import CONFIG, DSP
from clapsep.export.families.clapsep import TUNED
from clapsep.runtime.tokenizer import Tokenizer
from torch import Tensor, nn

from .bank import Bank, make_bank
from .clips import Clips
from .loss import sdr, separation_loss
from .mixtures import Float32, ask, at_snr, choose_sources, fit_peak
from .overlap import istft
from .pretrain import CHECKPOINT, log_mels
from .sounds import CLASSES
from .weights import rounded, write_weights

RATE = 1e-3
MIXTURES, QUESTIONS = 8, 2  # per step; the questions about one mixture share the encoder
SAVE_SECONDS, LOOK_STEPS = 180, 400


@dataclass(frozen=True)
class Batch:
    """Mixtures [M, n]; targets [M · Q, n] and conditions [M · Q, 2 · embedding], the questions of one mixture in a row."""

    mixtures: Tensor
    targets: Tensor
    conditions: Tensor


def _alpha(random: np.random.Generator) -> float:
    """Weight of the audio embedding: text alone, audio alone, or U(0, 1) (paper section III-E)."""
    u = float(random.random())
    return 0.0 if u < 0.25 else 1.0 if u < 0.45 else float(random.random())


def make_batch(random: np.random.Generator, clips: Clips, bank: Bank, size: int = MIXTURES) -> Batch:
    mixtures, targets, conditions = [], [], []
    for _ in range(size):
        names = choose_sources(random, CLASSES)
        used = {name: clips.pick(random) for name in names}
        sources = clips.sources(random, names, list(used.values()))
        if random.random() < 0.05:  # the last window of a recording is filled up with silence
            sources[:, int(random.uniform(0.3, 0.95) * sources.shape[1]) :] = 0
        mixtures.append(sources.sum(0))
        for wanted in random.permutation(len(names))[:QUESTIONS]:
            question = ask(random, names, CLASSES, int(wanted))
            targets.append(sources[list(question.kept)].sum(0) if question.kept else np.zeros_like(sources[0]))
            conditions.append(bank.condition(random, question, used, _alpha(random)))
    return Batch(*(torch.from_numpy(np.stack(rows)) for rows in (mixtures, targets, conditions)))


def two_sources(random: np.random.Generator, clips: Clips, bank: Bank, kind: str, count: int) -> Batch:
    """Validation: two unseen sources at 0 dB and one text question each, in held-out words."""
    mixtures, targets, conditions = [], [], []
    for _ in range(count):
        names = tuple(str(n) for n in random.choice(CLASSES, 2, replace=False))
        parts = np.stack([clips.cut(random, name, clips.pick(random)) for name in names])
        sources: Float32 = fit_peak(at_snr(parts, [0], 0.0), 0.7)
        question = ask(np.random.Generator(np.random.PCG64(3)), names, CLASSES, 0, kind)
        mixtures.append(sources.sum(0))
        targets.append(sources[0])
        conditions.append(bank.condition(random, question, {}, 0.0))
    return Batch(*(torch.from_numpy(np.stack(rows)) for rows in (mixtures, targets, conditions)))


class Model(nn.Module):
    """The separator between two transforms, with the encoder run once per mixture."""

    def __init__(self, separator: Separator) -> None:
        super().__init__()
        self.separator = separator

    def forward(self, batch: Batch, *, half: bool = True) -> Tensor:
        """Estimates [M · Q, n]."""
        repeats = len(batch.conditions) // len(batch.mixtures)
        with torch.no_grad():
            spectrum = torch_dsp.stft(batch.mixtures, DSP.n_fft, DSP.hop)
            mels = log_mels(batch.mixtures.numpy())
        decoder = self.separator.decoder_model
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            projected = [p.repeat_interleave(repeats, 0) for p in self.separator.encode(spectrum.abs(), mels)]
            logits = decoder(projected, decoder.coefficients(batch.conditions))
        mask = logits.float().sigmoid()
        return istft(spectrum.repeat_interleave(repeats, 0) * mask, DSP.n_fft, DSP.hop, DSP.window_samples)


def build(clap: AudioEncoder) -> Separator:
    """A separator over a copy of CLAP's audio branch, in which only LoRA, the attention biases and the decoder learn."""
    separator = Separator(CONFIG)
    own = {n: v for n, v in clap.audio_branch.state_dict().items() if not n.startswith("norm.")}
    missing = separator.audio_branch.load_state_dict(own, strict=False)
    if missing.unexpected_keys or any(".lora_" not in n for n in missing.missing_keys):
        raise RuntimeError(f"CLAP's audio branch does not fit: {missing}")
    for name, parameter in separator.named_parameters():
        parameter.requires_grad_(name.startswith("decoder_model.") or bool(TUNED.search(name)))
    return separator


@torch.no_grad()
def calibrate(separator: Separator, batch: Batch) -> None:
    """spec_norm is kept in eval form, so its statistics are measured once."""
    magnitude = torch_dsp.stft(batch.mixtures, DSP.n_fft, DSP.hop).abs().flatten(0, 1)
    norm = separator.decoder_model.spec_norm
    norm.running_mean.copy_(magnitude.mean(0))
    norm.running_var.copy_(magnitude.var(0))


@torch.no_grad()
def validate(model: Model, sets: dict[str, Batch]) -> str:
    """Mean SDR improvement of each validation set, in words."""
    words = []
    for kind, batch in sets.items():
        gain = sdr(batch.targets, model(batch)) - sdr(batch.targets, batch.mixtures)
        words.append(f"{kind} {gain.mean():5.2f}")
    return "SDRi " + "  ".join(words)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pool", type=Path, required=True, help="folder with the pool and stage 1; checkpoints go there too")
    parser.add_argument("--out", type=Path, required=True, help="folder for the weights")
    parser.add_argument("--minutes", type=float, default=65, help="whole budget, time before a resume included")
    parser.add_argument("--seed", type=int, default=2)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    random = np.random.Generator(np.random.PCG64(args.seed))
    towers = torch.load(args.pool / CHECKPOINT, weights_only=True)
    text, audio = TextEncoder(CONFIG.clap), AudioEncoder(CONFIG.clap, DSP.frames)
    text.load_state_dict(rounded(towers["text"]))
    audio.load_state_dict(rounded(towers["audio"]))
    tokenizer = Tokenizer(args.pool / "tokenizer.json", CONFIG.clap.text.context)
    clips, dev = Clips(args.pool / "train.npy", DSP.window_samples), Clips(args.pool / "dev.npy", DSP.window_samples)
    bank, dev_bank = make_bank(text, audio, tokenizer, clips, 1, test=False), make_bank(text, audio, tokenizer, dev, 2, test=True)
    seeds = np.random.Generator(np.random.PCG64(77))
    sets = {kind: two_sources(seeds, dev, dev_bank, kind, 64) for kind in ("PN", "P", "N")}
    model = Model(build(audio))
    calibrate(model.separator, make_batch(random, clips, bank, 128))
    learning = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(learning, RATE, weight_decay=0.01)
    state, path = {"step": 0, "seconds": 0.0}, args.pool / "train.pt"
    if path.exists():
        saved = torch.load(path, weights_only=True)
        model.load_state_dict(saved["model"])
        optimiser.load_state_dict(saved["optimiser"])
        state = saved["state"]
        random = np.random.Generator(np.random.PCG64([args.seed, state["step"]]))
    print(f"from step {state['step']}; {sum(p.numel() for p in learning)} parameters learn", flush=True)

    def save() -> None:
        torch.save({"model": model.state_dict(), "optimiser": optimiser.state_dict(), "state": state}, path.with_suffix(".part"))
        os.replace(path.with_suffix(".part"), path)
        write_weights(args.out, text, audio, model.separator, args.pool / "tokenizer.json")

    total, saved_at, losses = args.minutes * 60, state["seconds"], []
    while state["seconds"] < total:
        begin = time.monotonic()
        for group in optimiser.param_groups:
            group["lr"] = RATE * min((state["step"] + 1) / 200, 0.501 + 0.5 * math.cos(math.pi * state["seconds"] / total))
        batch = make_batch(random, clips, bank)
        loss = separation_loss(batch.targets, model(batch), batch.mixtures.repeat_interleave(QUESTIONS, 0))
        optimiser.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(learning, 5.0)
        if torch.isfinite(norm):
            optimiser.step()
        losses.append(loss.item())
        state["step"] += 1
        if state["step"] % LOOK_STEPS == 0:
            mean, losses = float(np.mean(losses)), []
            print(f"{state['seconds'] / 60:5.1f} min  step {state['step']}  loss {mean:6.2f}  {validate(model, sets)}", flush=True)
        state["seconds"] += time.monotonic() - begin
        if state["seconds"] - saved_at > SAVE_SECONDS:
            saved_at = state["seconds"]
            save()
    print(f"done: {state['step']} steps, {state['step'] * MIXTURES} mixtures, {validate(model, sets)}", flush=True)
    save()


if __name__ == "__main__":
    main()
