"""Where a model's files are: a folder as it is named, or the id of a repository on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from core.errors import CheckpointError

PATTERNS = ("*.json", "*.safetensors", "*.jinja")  # weights as safetensors only; nothing that could be code


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
    """From the hub that HF_ENDPOINT names, into the cache that HF_HOME names."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=list(PATTERNS)))
    except HFValidationError as error:
        raise CheckpointError(f"{model}: neither a folder nor the id of a model: {error}") from error
    except LocalEntryNotFoundError as error:
        raise CheckpointError(f"{model}: not in the local cache, and the hub cannot be reached: {error}") from error
    except (HfHubHTTPError, OSError) as error:
        raise CheckpointError(f"{model}: cannot be downloaded: {error}") from error
