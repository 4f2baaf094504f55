"""Where a model's files are: a folder as it is named, or the id of a repository on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from core.errors import CheckpointError

PATTERNS = ("*.json", "*.safetensors", "*.jinja")  # weights as safetensors only; nothing that could be code
NOT_WANTED = ("*/*", "consolidated*")  # the same weights once more, in their makers' own format


def locate(model: str) -> Path:
    """The folder of the checkpoint, downloaded (with progress bars) if `model` is an id. Raises CheckpointError."""
    folder = Path(model)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise CheckpointError(f"{folder}: no config.json in this folder; a checkpoint has one beside its weights")
        return folder.resolve()
    if folder.exists() or model.startswith(("/", ".", "~")) or model.count("/") > 1:
        raise CheckpointError(f"{model}: no such folder")
    return _download(model)


def _download(model: str) -> Path:
    """From the hub that HF_ENDPOINT names, into the cache that HF_HOME names; the cache alone if there is no hub."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    hub = constants.ENDPOINT
    # The hub's library has changed its HTTP client with its major versions; its own error derives from that client's.
    broken: tuple[type[Exception], ...] = (*HfHubHTTPError.__bases__, OSError)
    try:
        return Path(snapshot_download(model, allow_patterns=list(PATTERNS), ignore_patterns=list(NOT_WANTED)))
    except HFValidationError as error:
        raise CheckpointError(f"{model}: neither a folder nor the id of a model") from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(f"{model}: no such folder, and no such model on {hub}, or a private one") from error
    except LocalEntryNotFoundError as error:
        why = f"{hub} cannot be reached, or does not answer as a hub"
        raise CheckpointError(f"{model}: no such folder, not in the local cache, and {why}") from error
    except broken as error:
        why = str(error).strip().partition("\n")[0]
        raise CheckpointError(f"{model}: the download from {hub} failed: {why}") from error
