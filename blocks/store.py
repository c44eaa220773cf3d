"""Where models live on disk, and how much room they may take."""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import Field, HttpUrl, field_validator

from prefect_huggingface.blocks.base import ConfigurationBlock


def default_store_path() -> Path:
    """Return the folder of the default store: `PREFECT_HUGGINGFACE_HOME`, or a folder in the user's cache."""
    home = os.environ.get("PREFECT_HUGGINGFACE_HOME")
    if home:
        return Path(home).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "prefect-huggingface"


class ModelStore(ConfigurationBlock):
    """Folder that holds downloaded snapshots and OpenVINO exports, with an upper limit for its size.

    Several processes may use one store at the same time.

    Example:
        Load a saved store and look at its place:
        ```python
        from prefect_huggingface.blocks import ModelStore

        store = ModelStore.load("BLOCK_NAME")
        print(store.path)
        ```
    """

    _block_type_name = "Hugging Face Model Store"
    _block_type_slug = "hugging-face-model-store"
    _documentation_url = HttpUrl("https://huggingface.co/docs/huggingface_hub/guides/manage-cache")

    path: Path = Field(
        default_factory=default_store_path,
        title="Folder",
        description="Folder of the store, on a disk with room for the models. It is made when it is first needed.",
    )
    max_size_gb: float | None = Field(
        default=None,
        gt=0,
        title="Size limit (GB)",
        description="Size in units of 10^9 bytes above which the least recently used models are removed.",
    )
    lock_timeout_seconds: float = Field(
        default=3600,
        gt=0,
        title="Lock timeout (seconds)",
        description="How long one process waits for another one that makes the same export or downloads the same file.",
    )

    @field_validator("path")
    @classmethod
    def _make_absolute(cls, path: Path) -> Path:
        # A relative path would mean another folder in every worker.
        return Path(os.path.abspath(path.expanduser()))
