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
        return _absolute(Path(home))
    return _absolute(Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "prefect-huggingface")


def hugging_face_cache() -> Path:
    """Return the cache of the Hugging Face libraries, by the variables that they read; they are read now."""
    places = {"HF_HUB_CACHE": "", "HUGGINGFACE_HUB_CACHE": "", "HF_HOME": "hub", "TRANSFORMERS_CACHE": ""}
    for name, below in places.items():
        if place := os.environ.get(name):
            return _absolute(Path(os.path.expandvars(place)) / below)
    return _absolute(Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface" / "hub")


def _absolute(path: Path) -> Path:
    # A relative path would mean another folder in every worker.
    return Path(os.path.abspath(path.expanduser()))


class ModelStore(ConfigurationBlock):
    """Where downloaded snapshots and OpenVINO exports lie, with an upper limit for their size.

    Without a folder, snapshots lie in the cache that all Hugging Face libraries share (`HF_HUB_CACHE`, `HF_HOME`) and
    exports in a folder of the user's cache. With a folder, both are in it. Several processes may use one store at the
    same time.

    Example:
        Load a saved store and look at its place:
        ```python
        from prefect_huggingface.blocks import ModelStore

        store = ModelStore.load("BLOCK_NAME")
        print(store.folder, store.hub_cache)
        ```
    """

    _block_type_name = "Hugging Face Model Store"
    _block_type_slug = "hugging-face-model-store"
    _documentation_url = HttpUrl("https://huggingface.co/docs/huggingface_hub/guides/manage-cache")

    path: Path | None = Field(
        default=None,
        title="Folder",
        description=(
            "Folder for snapshots and exports. When left empty, snapshots lie in the Hugging Face cache and exports in "
            "a folder of the user's cache."
        ),
    )
    max_size_gb: float | None = Field(
        default=None,
        gt=0,
        title="Size limit (GB)",
        description=(
            "Size in units of 10^9 bytes above which the least recently used models are removed. Only what this "
            "library has downloaded or made counts and goes."
        ),
    )
    lock_timeout_seconds: float = Field(
        default=3600,
        gt=0,
        title="Lock timeout (seconds)",
        description="How long one process waits for another one that makes the same export or downloads the same file.",
    )

    @field_validator("path")
    @classmethod
    def _make_absolute(cls, path: Path | None) -> Path | None:
        return None if path is None else _absolute(path)

    @property
    def folder(self) -> Path:
        """Folder of the exports and of everything else that is made here."""
        return self.path or default_store_path()

    @property
    def hub_cache(self) -> Path:
        """Folder of the snapshots from the default Hub, in the layout of the Hugging Face cache."""
        return hugging_face_cache() if self.path is None else self.path / "hub"
