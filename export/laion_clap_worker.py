"""Embed token ids and waveforms with the laion_clap package, for `clapsep-export verify`.

Runs in an environment of its own (laion_clap wants numpy<2): it must not import clapsep-export.
Exit codes: 0 done, 1 bad input or failed run, 2 bad usage or a missing package.
"""

from __future__ import annotations

import json
import os
import platform
import re
import sys
import types
import warnings
import zipfile
from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # imported late, so that a missing package is reported in one sentence
    import numpy as np

TOKENS, DIM, MAX_SAMPLES = 77, 512, 480000
INSTALL = "pip install 'laion_clap==1.1.7' safetensors in an environment of its own"
EXPECTED = (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile)
# Fixed by construction: a checkpoint may omit them, or hold some that this transformers has not.
DERIVED = re.compile(r"(melW|stft\.conv_\w+\.weight|position_index|attn_mask|position_ids|batches_tracked)$")
# laion_clap imports these for its data loaders and for training; nothing here calls them.
UNUSED: dict[str, tuple[str, ...]] = {
    "torchvision": ("transforms", "datasets", "ops", "ops.misc"),
    "PIL": ("Image",),
    **dict.fromkeys(("braceexpand", "ftfy", "h5py", "pandas", "webdataset", "wget"), ()),
}


class Placeholder:
    """Whatever is taken from a stub module: can be imported, but not created."""

    def __init__(self, *_: object, **__: object) -> None:
        raise RuntimeError("laion_clap used a module that is only a stub here")


class StubModule(types.ModuleType):
    """Stands in for a module that is imported and never used."""

    def __getattr__(self, name: str) -> type[Placeholder]:
        if name.startswith("__"):  # the import machinery must see that these are absent
            raise AttributeError(name)
        return Placeholder


def refuse_network(event: str, args: tuple[Any, ...]) -> None:
    """Audit hook: a look-up or a connection means that something wants a download."""
    lookup = event in ("socket.getaddrinfo", "socket.gethostbyname")
    if lookup or (event == "socket.connect" and isinstance(args[1], tuple)):  # str: a local socket
        raise ConnectionError(f"a package tried to reach the network ({event} {args[:2]})")


def isolate() -> None:
    """Keep the modules beside this script, the network and log chatter away from the packages."""
    here = os.path.realpath(os.path.dirname(__file__))
    sys.path[:] = [p for p in sys.path if os.path.realpath(p) != here]
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
    warnings.simplefilter("ignore")
    sys.addaudithook(refuse_network)


def put_stubs(top: str, names: list[str]) -> None:
    for name in [n for n in sys.modules if n.split(".")[0] == top]:
        del sys.modules[name]  # leave no half-imported package behind
    for name in names:
        sys.modules[name] = StubModule(name)
        parent, _, leaf = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], leaf, sys.modules[name])


def stub_unimportable() -> list[str]:
    """Stub what laion_clap imports without use, if missing or broken; return the names."""
    stubbed = []
    for top, children in UNUSED.items():
        names = [top, *(f"{top}.{child}" for child in children)]
        try:
            for name in names:
                import_module(name)
        except (ImportError, AttributeError, OSError, RuntimeError, ValueError):
            put_stubs(top, names)  # RuntimeError: a torchvision built for another torch
            stubbed.append(top)
    return stubbed


def patch_downloads() -> None:
    """Build RoBERTa from its config (the checkpoint has all weights) and no tokenizer at all."""
    from transformers import RobertaConfig, RobertaModel
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

    # Where roberta-base differs from the defaults of RobertaConfig.
    base = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}

    def untrained(cls: Any, /, *_: object, **__: object) -> Any:
        return cls(RobertaConfig(**base, layer_norm_eps=1e-5))

    RobertaModel.from_pretrained = classmethod(untrained)
    PreTrainedTokenizerBase.from_pretrained = classmethod(lambda *_, **__: None)


def import_packages() -> list[str]:
    """Import laion_clap with its downloads turned off; return the stubbed modules."""
    patch_downloads()  # before stubs, so that transformers sees which modules are really there
    stubbed = stub_unimportable()
    import_module("laion_clap")
    return stubbed


def load_clap(path: str) -> Any:
    """The package's own model with every tensor of the checkpoint in place."""
    from laion_clap import CLAP_Module
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error
    clap = CLAP_Module(enable_fusion=False, device="cpu", amodel="HTSAT-base", tmodel="roberta")
    result = clap.model.load_state_dict(state, strict=False)
    for kind, names in (("lacks", result.missing_keys), ("adds", result.unexpected_keys)):
        wrong = [name for name in names if not DERIVED.search(name)]
        if wrong:
            raise ValueError(f"{path} {kind} {len(wrong)} tensors, the first is {wrong[0]}")
    return clap.float().eval()  # eval also turns off dropout and spectrogram masking


def read_input(path: str) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Token ids, attention mask and waveforms, checked."""
    import numpy as np

    with np.load(path, allow_pickle=False) as data:
        ids, mask = data["input_ids"], data["attention_mask"]
        waves = [data[f"wave_{i}"] for i in range(len(data.files) - 2)]
    for array in (ids, mask):
        if array.dtype != np.int64 or array.ndim != 2 or array.shape != (len(ids), TOKENS):
            raise ValueError(f"{path}: the token arrays must both be int64 [n, {TOKENS}]")
    for i, wave in enumerate(waves):  # the package crops a longer one at random
        if wave.dtype != np.float32 or wave.ndim != 1 or not 1 <= wave.size <= MAX_SAMPLES:
            raise ValueError(f"{path}: wave_{i} must be float32 with 1 to {MAX_SAMPLES} samples")
    return ids, mask, waves


def embed(clap: Any, ids: np.ndarray, mask: np.ndarray, waves: list[np.ndarray]) -> dict[str, Any]:
    """Both embeddings by the package's public methods, one item at a time to bound memory."""
    import numpy as np
    import torch

    def tokens(row: int) -> dict[str, torch.Tensor]:
        arrays = {"input_ids": ids[[row]], "attention_mask": mask[[row]]}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    with torch.no_grad():
        text = [clap.get_text_embedding(row, tokenizer=tokens) for row in range(len(ids))]
        audio = [clap.get_audio_embedding_from_data([wave], use_tensor=False) for wave in waves]
    lists = {"text_embedding": text, "audio_embedding": audio}
    out = {k: np.concatenate([np.zeros((0, DIM), np.float32), *v]) for k, v in lists.items()}
    if not all(np.isfinite(value).all() for value in out.values()):
        raise ValueError("an embedding has values that are not finite")
    return out


def run(checkpoint: str, source: str, target: str) -> None:
    stubbed = import_packages()
    ids, mask, waves = read_input(source)  # before the model: a bad input should fail early
    out = embed(load_clap(checkpoint), ids, mask, waves)
    packages = {k: metadata.version(k) for k in ("torch", "numpy", "laion_clap", "transformers")}
    versions = {"python": platform.python_version(), **packages, "stubbed": stubbed}
    with open(f"{target}.part", "wb") as file:  # an open file, so that numpy adds no suffix
        import_module("numpy").savez(file, **out, versions=json.dumps(versions))
    os.replace(f"{target}.part", target)


def main(argv: list[str]) -> int:
    if len(argv) != 3:
        print("usage: laion_clap_worker.py CLAP.safetensors INPUT.npz OUTPUT.npz", file=sys.stderr)
        return 2
    isolate()
    try:
        run(*argv)
    except ImportError as error:
        print(f"error: cannot import laion_clap ({error}): {INSTALL}", file=sys.stderr)
        return 2
    except EXPECTED as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
