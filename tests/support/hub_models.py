"""Models on the local Hub, and the blocks for them, with short waits."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path
from typing import Any

from prefect_huggingface.blocks import HuggingFaceCredentials, LocalModel, ModelStore
from support.hub_server import LocalHub

MEGABYTE = 1 << 20
SMALL_FILES = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b'{"version": "1.0"}',
    "tokenizer_config.json": b'{"chat_template": "{{ messages }}"}',
}


def random_bytes(size: int, seed: int = 0) -> bytes:
    """Return bytes that look random and are the same for the same seed."""
    return random.Random(seed).randbytes(size)


def model_files(size: int = 4 * MEGABYTE, seed: int = 0, **more: bytes) -> dict[str, Any]:
    """Return the files of a repository whose weights have a size."""
    return {**SMALL_FILES, "model.safetensors": random_bytes(size, seed), **more}


def hub_model(hub: LocalHub, store: Path, model_id: str = "org/model", **options: Any) -> LocalModel:
    """Return the block for a repository of the local Hub."""
    settings = {"timeout_seconds": 1, "max_attempts": 3, **options.pop("settings", {})}
    if (token := options.pop("token", None)) is not None:
        settings["token"] = token
    return LocalModel(
        model_id=model_id,
        store=ModelStore(path=store, **options.pop("store_settings", {})),
        credentials=HuggingFaceCredentials(endpoint=hub.endpoint, **settings),
        **{"backend": "torch", **options},
    )


def check_snapshot(path: Path, files: dict[str, bytes]) -> None:
    """Check that a folder holds exactly these files with exactly this content."""
    found = {p.relative_to(path).as_posix(): p for p in path.rglob("*") if p.is_file() and p.name != ".lease"}
    assert set(found) == set(files)
    for name, content in files.items():
        assert hashlib.sha256(found[name].read_bytes()).digest() == hashlib.sha256(content).digest(), name
