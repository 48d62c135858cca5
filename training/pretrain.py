"""Stage 1, a tiny CLAP: text and audio towers by contrast. python -m training.pretrain --pool FOLDER --minutes M."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import numpy as np
import torch
from clapsep.export import torch_dsp
from clapsep.export.clap import AudioEncoder, TextEncoder
from clapsep.export.demo import CONFIG, DSP, VOCABULARY
from clapsep.export.vocabulary import train_tokenizer
from clapsep.runtime.tokenizer import Tokenizer
from torch import Tensor
from torch.nn import functional as F

from .captions import caption, corpus
from .clips import Clips
from .sounds import CLASSES

COUNTS = (0.5, 0.35, 0.15)  # of one, two and three sounds in a clip: the separator's encoder has to know mixtures
WORDINGS = 4  # captions per clip: text is much cheaper than audio
RATE = 1e-3
CHECKPOINT = "clap.pt"


def log_mels(waves: np.ndarray) -> Tensor:
    """[B, window] at 32 kHz → log-mel [B, frames, n_mels] by the 48 kHz path."""
    return torch_dsp.log_mel(torch_dsp.resample_2_3(torch.from_numpy(waves)), DSP.front_end)


def tokens(tokenizer: Tokenizer, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Ids and mask without the columns that are padding in every row; masked columns change nothing."""
    ids, mask = tokenizer.encode(texts)
    width = int(mask.sum(1).max())
    return torch.from_numpy(ids[:, :width]), torch.from_numpy(mask[:, :width])


def batch(random: np.random.Generator, clips: Clips, size: int) -> tuple[np.ndarray, list[str], np.ndarray]:
    """Waves, `WORDINGS` captions of each, and multi-hot labels."""
    waves, texts, labels = [], [], np.zeros((size, len(CLASSES)), np.float32)
    for row in range(size):
        names = tuple(str(n) for n in random.choice(CLASSES, 1 + random.choice(3, p=COUNTS), replace=False))
        if len(names) == 1:
            waves.append(clips.query(random, names[0], clips.pick(random)))
        else:
            waves.append(clips.sources(random, names, [clips.pick(random) for _ in names]).sum(0))
        texts += [caption(names, random, test=False) for _ in range(WORDINGS)]
        labels[row, [CLASSES.index(n) for n in names]] = 1
    return np.stack(waves), texts, labels


def contrast(audio: Tensor, text: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
    """Symmetric cross-entropy in which all captions of the same set of classes are right."""
    logits = audio @ text.T * scale.exp().clamp(max=60)
    same = (torch.cdist(labels, labels.repeat_interleave(WORDINGS, 0), p=1) < 0.5).float()
    across, down = same / same.sum(1, keepdim=True), same.T / same.T.sum(1, keepdim=True)
    return (F.cross_entropy(logits, across) + F.cross_entropy(logits.T, down)) / 2


@torch.no_grad()
def zero_shot(text: TextEncoder, audio: AudioEncoder, tokenizer: Tokenizer, clips: Clips, per_class: int = 12) -> float:
    """Share of unseen clips whose nearest held-out caption, one per class, names their class."""
    random = np.random.Generator(np.random.PCG64(5))
    right, per_class = 0, min(per_class, clips.data.shape[1])
    for i in range(per_class):
        waves = np.stack([clips.query(random, name, i % clips.data.shape[1]) for name in CLASSES])
        texts = text(*tokens(tokenizer, [caption([name], random, test=True) for name in CLASSES]))
        right += int((audio(log_mels(waves)) @ texts.T).argmax(1).eq(torch.arange(len(CLASSES))).sum())
    return right / per_class / len(CLASSES)


def spread(text: TextEncoder) -> None:
    """Initial weights under which different texts have different embeddings; with the defaults their cosine is 0.9999."""
    for module in text.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.xavier_normal_(module.weight, gain=1.4)
            torch.nn.init.zeros_(module.bias)
    tables = text.text_branch.embeddings
    torch.nn.init.normal_(tables.word_embeddings.weight, std=1.0)
    torch.nn.init.normal_(tables.position_embeddings.weight, std=0.1)
    torch.nn.init.zeros_(tables.token_type_embeddings.weight)


@torch.no_grad()
def calibrate(audio: AudioEncoder, random: np.random.Generator, clips: Clips) -> None:
    """bn0 is kept in eval form, so its statistics are measured once."""
    mels = log_mels(batch(random, clips, 256)[0]).flatten(0, 1)
    audio.audio_branch.bn0.running_mean.copy_(mels.mean(0))
    audio.audio_branch.bn0.running_var.copy_(mels.var(0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pool", type=Path, required=True, help="folder of training.pool; the result goes there too")
    parser.add_argument("--minutes", type=float, default=11)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--warm", type=Path, help="go on from this earlier result")
    args = parser.parse_args()
    if (args.pool / CHECKPOINT).exists() and args.warm is None:
        print(f"{args.pool / CHECKPOINT} is there already")  # stage 2 goes on only from the CLAP that it began with
        return
    torch.manual_seed(args.seed)
    random = np.random.Generator(np.random.PCG64(args.seed))
    path = args.pool / "tokenizer.json"
    train_tokenizer(corpus(), VOCABULARY).save(str(path))
    tokenizer = Tokenizer(path, CONFIG.clap.text.context)
    clips, dev = Clips(args.pool / "train.npy", DSP.window_samples), Clips(args.pool / "dev.npy", DSP.window_samples)
    text, audio = TextEncoder(CONFIG.clap), AudioEncoder(CONFIG.clap, DSP.frames)
    spread(text)
    calibrate(audio, random, clips)
    if args.warm is not None:
        towers = torch.load(args.warm, weights_only=True)
        text.load_state_dict(towers["text"])
        audio.load_state_dict(towers["audio"])
    scale = torch.nn.Parameter(torch.tensor(2.7))
    parameters = [*text.parameters(), *audio.parameters(), scale]
    optimiser = torch.optim.AdamW(parameters, RATE, weight_decay=0.01)
    begin, step, total = time.monotonic(), 0, args.minutes * 60
    while (done := (time.monotonic() - begin) / total) < 1:
        rate = RATE * min((step + 1) / 30, 0.5 + 0.5 * np.cos(np.pi * done))
        for group in optimiser.param_groups:
            group["lr"] = rate
        waves, texts, labels = batch(random, clips, args.batch)
        with torch.no_grad():
            mels = log_mels(waves)
        with torch.autocast("cpu", torch.bfloat16):  # twice as fast; what follows is float32 again
            heard = audio(mels)
        loss = contrast(F.normalize(heard.float(), dim=-1), text(*tokens(tokenizer, texts)), torch.from_numpy(labels), scale)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        step += 1
        if step % 20 == 0:
            print(f"{time.monotonic() - begin:5.0f} s  step {step}  loss {loss.item():.3f}  scale {scale.exp().item():.1f}", flush=True)
        if step % 100 == 0:
            print(f"        zero-shot {zero_shot(text, audio, tokenizer, dev):.3f}", flush=True)
    print(f"        zero-shot {zero_shot(text, audio, tokenizer, dev, 40):.3f} after {step} steps", flush=True)
    torch.save({"text": text.state_dict(), "audio": audio.state_dict()}, args.pool / "clap.part")
    os.replace(args.pool / "clap.part", args.pool / CHECKPOINT)


if __name__ == "__main__":
    main()
