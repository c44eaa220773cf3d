"""What a model server is told on its command line."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from prefect_huggingface.deployments.model_server.models import SLUG

LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "::1")


def _positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return value


def _option(help: str, default: Any = None, **more: Any) -> Any:
    shown = f" (default: {default})" if default else ""
    return field(default_factory=lambda: copy(default), metadata={"help": help + shown, **more})


@dataclass
class ServerSettings:
    """How a server behaves. Each field is an option of the command line."""

    block: list[str] = _option(f"saved block {SLUG}/NAME, or all", [], metavar="NAME", action="append")
    model: list[str] = _option("model, without a Prefect server", [], metavar="ID_OR_FOLDER", action="append")
    weight_format: str | None = _option("weights of the OpenVINO export of --model, such as int8")
    backend: str | None = _option("what runs --model", choices=["openvino", "torch"])
    task: str | None = _option("task of --model, such as image-text-to-text")
    device: str | None = _option("device of --model, such as CPU")
    preload: bool = _option("load all models at the start", False, action="store_true")
    memory_gb: float | None = _option("resident memory of the process; idle models go first", type=_positive)
    idle_minutes: float | None = _option("close a model that nobody used for so long", type=_positive)
    host: str = _option("address to listen at", "127.0.0.1")
    port: int = _option("port to listen at", 8000, type=int)
    api_key_file: Path | None = _option("one key a line; needed where other machines reach the host", type=Path)
    allow_remote_images: bool = _option("fetch images from http addresses", False, action="store_true")
    max_requests: int = _option("more are refused with status 429", 512, type=int)
    max_body_mb: float = _option("larger bodies are refused", 32.0, type=_positive)
    drain_seconds: int = _option("time for running requests at the end", 30, type=int)


def parse_arguments(arguments: Sequence[str] | None) -> ServerSettings:
    """Read the command line."""
    parser = argparse.ArgumentParser("prefect-huggingface-server", description="Start a model server.")
    for each in fields(ServerSettings):
        parser.add_argument(f"--{each.name.replace('_', '-')}", **each.metadata)
    settings = parser.parse_args(arguments, ServerSettings())
    if not settings.block and not settings.model:
        parser.error("Name what to serve: --block NAME, --block all or --model ID_OR_FOLDER.")
    return settings


def read_keys(path: Path | None, host: str) -> tuple[str, ...]:
    """Return the API keys.

    Raises:
        SystemExit: If there are none and the address can be reached from elsewhere.
    """
    if path is None:
        if host not in LOOPBACK_HOSTS:
            raise SystemExit(f"--host {host} can be reached from other machines. Give an --api-key-file with a key.")
        return ()
    try:
        keys = tuple(path.read_text(encoding="ascii").split())
    except (OSError, UnicodeError) as exc:
        raise SystemExit(f"The file {str(path)!r} of --api-key-file cannot be read: {type(exc).__name__}.") from None
    if not keys:
        raise SystemExit(f"--api-key-file {str(path)!r} is empty. Write a key into it.")
    return keys
