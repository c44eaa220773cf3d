"""Snapshots: where the files of a model are, whether they come from a folder or from the Hub."""

from __future__ import annotations

from prefect_huggingface.blocks import LocalModel
from prefect_huggingface.tasks.records import Snapshot


def get_snapshot(model: LocalModel) -> Snapshot:
    """Return the snapshot of a model; download it first where needed.

    Raises:
        ModelSourceError: If the model is a folder that is missing or holds no model.
        DownloadError: If the model is on the Hub and cannot be had.
    """
    if model.is_gguf:
        from prefect_huggingface.tasks.storage.gguf_files import snapshot_gguf

        return snapshot_gguf(model)
    if model.is_local:
        from prefect_huggingface.tasks.storage.local_snapshots import snapshot_folder

        return snapshot_folder(model)
    from prefect_huggingface.tasks.storage.hub import fetch_snapshot

    return fetch_snapshot(model)
