"""How does a model of the Hugging Face hub come to this machine?

Through the hub's own client and its own cache; what is written down here is only which snapshot
an id stands for.  Asking again asks the hub again; without a network the snapshot of the last time
serves.
"""

from __future__ import annotations

import pathlib
from typing import Protocol

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from llm_serving.errors import ConfigError
from llm_serving.prepare.sources import remember_snapshot

__all__ = ["download_snapshot"]

_WANTED = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]
_UNWANTED = ["*/*", "consolidated*"]  # other formats of the same weights
# The client is built on httpx or on its successor; either way this is its root of all errors
_HTTP_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]


class Download(Protocol):
    def __call__(
        self, repo_id: str, *, allow_patterns: list[str], ignore_patterns: list[str]
    ) -> str: ...


def download_snapshot(model: str, download: Download = snapshot_download) -> pathlib.Path:
    """The folder of hub id `model`, what was missing downloaded; ConfigError if there is none."""
    try:
        folder = pathlib.Path(download(model, allow_patterns=_WANTED, ignore_patterns=_UNWANTED))
    except (OSError, ValueError, _HTTP_ERROR) as exc:
        raise ConfigError(f"cannot download {model}: {_reason(exc)}") from exc
    remember_snapshot(model, folder)
    return folder


def _reason(exc: Exception) -> str:
    if isinstance(exc, GatedRepoError):
        return (
            "its licence has to be accepted on huggingface.co, and HF_TOKEN set to a token of yours"
        )
    if isinstance(exc, RepositoryNotFoundError):
        return "the hub knows no such model (if it is private, set HF_TOKEN)"
    if isinstance(exc, LocalEntryNotFoundError | OfflineModeIsEnabled | ConnectionError):
        return (
            "the Hugging Face hub can not be reached and the model was not downloaded before; "
            "check the network (and HF_HUB_OFFLINE), or give the path of a folder or .gguf file"
        )
    return f"{type(exc).__name__}: {str(exc).splitlines()[0] if str(exc) else 'no details'}"
