"""Fetch checkpoints named as `hf://owner/repo/path` from the Hugging Face hub; local paths pass through."""

from __future__ import annotations

from pathlib import Path

from ..runtime.errors import CheckpointError, DownloadError

SCHEME = "hf://"


def fetch(location: str) -> Path:
    """A local path for `location`: itself, or the hub's file in the local cache, downloaded if it is not there yet.

    `hf://owner/repo/path[@revision]`. An interrupted download resumes. HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE
    are honoured.

    Raises:
        CheckpointError: the location is malformed.
        DownloadError: the hub cannot be reached, or has no such file.
    """
    if not location.startswith(SCHEME):
        return Path(location)
    address, _, revision = location.removeprefix(SCHEME).partition("@")
    parts = address.split("/")
    if len(parts) < 3 or not all(parts) or ".." in parts:
        raise CheckpointError(f"'{location}' is not a hub address; write hf://owner/repo/path or hf://owner/repo/path@revision")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(hf_hub_download("/".join(parts[:2]), "/".join(parts[2:]), revision=revision or None))
    except HfHubHTTPError as error:
        reason = str(error).strip().splitlines()[0]
        raise DownloadError(f"'{location}' cannot be downloaded ({reason}); check owner, repository, path and access") from error
    except Exception as error:  # connection errors come from whichever HTTP library the hub client uses
        raise DownloadError(
            f"'{location}' cannot be downloaded ({type(error).__name__}); check the network or give a local file"
        ) from error
