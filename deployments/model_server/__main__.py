"""Start a model server.

    prefect-huggingface-server --block default --block summarizer
    prefect-huggingface-server --block all --host 0.0.0.0 --api-key-file keys.txt
    prefect-huggingface-server --model HuggingFaceTB/SmolLM2-135M-Instruct --weight-format int8

The blocks are those of the Prefect server of `PREFECT_API_URL`; with `--model` no Prefect server is needed.
"""

from __future__ import annotations

import argparse
import ipaddress
import logging
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from prefect_huggingface.blocks import LocalModel
from prefect_huggingface.deployments.model_server.models import ServedModel, ServedModels, name_of

MAX_PIXELS = 50_000_000
SLUG = LocalModel.get_block_type_slug()


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser("prefect-huggingface-server", description=__doc__.split("\n")[0])
    what = parser.add_argument_group("models")
    what.add_argument("--block", action="append", default=[], metavar="NAME", help=f"saved block {SLUG}/NAME, or all")
    what.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="ID_OR_FOLDER",
        help="Hub id or folder; needs no Prefect server",
    )
    what.add_argument("--weight-format", help="weights of the OpenVINO export of --model, such as int8")
    what.add_argument("--backend", choices=["openvino", "torch"], help="what runs --model")
    what.add_argument("--task", help="task of --model, such as image-text-to-text")
    what.add_argument("--device", help="device of --model, such as CPU")
    what.add_argument("--preload", action="store_true", help="load all models at the start")
    what.add_argument("--memory-gb", type=_positive, help="resident memory of the process; idle models go first")
    what.add_argument("--idle-minutes", type=_positive, help="close a model that nobody used for so long")
    where = parser.add_argument_group("network")
    where.add_argument("--host", default="127.0.0.1")
    where.add_argument("--port", type=int, default=8000)
    where.add_argument("--api-key-file", type=Path, help="file with one key a line; needed for other hosts than this")
    where.add_argument("--allow-remote-images", action="store_true", help="fetch images from http addresses")
    where.add_argument("--max-requests", type=int, default=512, help="more are refused with status 429")
    where.add_argument("--max-body-mb", type=_positive, default=32.0)
    where.add_argument("--drain-seconds", type=int, default=30, help="time for running requests at the end")
    given = parser.parse_args(arguments)
    if not given.block and not given.model:
        parser.error("Name what to serve: --block NAME, --block all or --model ID_OR_FOLDER.")
    return given


def _positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return value


def load_blocks(names: Sequence[str]) -> list[ServedModel]:
    """Return the models of saved blocks.

    Raises:
        SystemExit: If there is no such block, or no Prefect server.
    """
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL

    if not PREFECT_API_URL.value():
        raise SystemExit("Blocks need a Prefect server. Set PREFECT_API_URL to its address, or use --model.")
    names = [name.removeprefix(f"{SLUG}/") for name in names]
    if "all" in names:
        with get_client(sync_client=True) as client:
            names = [str(each.name) for each in client.read_block_documents_by_type(SLUG)]
        if not names:
            raise SystemExit("No block of a local model is saved. Save one with `make blocks`, or use --model.")
    served = []
    for name in dict.fromkeys(names):
        try:
            block: Any = LocalModel.load(name)
        except ValueError as exc:
            raise SystemExit(f"There is no block {SLUG}/{name}. Save it first, or use --block all. ({exc})") from None
        served.append(ServedModel(name, block))
    return served


def read_keys(path: Path | None, host: str) -> tuple[str, ...]:
    """Return the API keys.

    Raises:
        SystemExit: If there are none and the address can be reached from elsewhere.
    """
    if path is not None:
        try:
            keys = tuple(line.strip() for line in path.read_text(encoding="ascii").splitlines() if line.strip())
        except (OSError, UnicodeError) as exc:
            raise SystemExit(
                f"The file {str(path)!r} of --api-key-file cannot be read: {type(exc).__name__}."
            ) from None
        if not keys:
            raise SystemExit(f"--api-key-file {str(path)!r} is empty. Write a key into it.")
        return keys
    if not _is_loopback(host):
        raise SystemExit(f"--host {host} can be reached from other machines. Give an --api-key-file with a key.")
    return ()


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve until SIGTERM or Ctrl-C."""
    given = parse_arguments(arguments)
    # Also before uvicorn listens to it; at its end, this runs the exit handlers, which close the engines.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    keys = read_keys(given.api_key_file, given.host)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)-7s %(message)s")
    for name in ("httpx", "httpcore"):
        logging.getLogger(name).setLevel(logging.WARNING)
    models = load_blocks(given.block) if given.block else []
    settings = {name: getattr(given, name) for name in ("weight_format", "backend", "task", "device")}
    settings = {name: value for name, value in settings.items() if value is not None}
    if settings.get("backend") == "torch":
        settings.setdefault("weight_format", None)
    models += [ServedModel(name_of(each), LocalModel(model_id=each, **settings)) for each in given.model]
    serve(ServedModels(models), given, keys)


def allow_open_files() -> None:
    """Let this process open as many files as it may: every connection is one."""
    try:
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    except (ImportError, ValueError, OSError):  # Windows has no such limit, macOS calls its limit infinite
        return


def serve(models: ServedModels, given: argparse.Namespace, keys: tuple[str, ...]) -> None:
    """Run the server."""
    import uvicorn

    from prefect_huggingface.deployments.model_server.app import ServerSettings, create_app
    from prefect_huggingface.tasks.engines.registry import set_memory_budget

    set_memory_budget(given.memory_gb)
    with suppress(ImportError):
        from PIL import Image

        # A small file may be a picture that fills the memory. Pillow refuses those of twice this.
        Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2
    allow_open_files()
    settings = ServerSettings(
        api_keys=keys,
        idle_seconds=given.idle_minutes * 60 if given.idle_minutes else None,
        preload=given.preload,
        allow_remote_images=given.allow_remote_images,
        max_requests=given.max_requests,
        max_body_bytes=int(given.max_body_mb * 10**6),
    )
    config = uvicorn.Config(
        create_app(models, settings), given.host, given.port, log_config=None, access_log=False, ws="none",
        server_header=False, proxy_headers=False, timeout_keep_alive=75, timeout_graceful_shutdown=given.drain_seconds,
    )  # fmt: skip
    logging.info("Serving %s at http://%s:%d/v1.", ", ".join(model.name for model in models), given.host, given.port)
    try:
        uvicorn.Server(config).run()
    except KeyboardInterrupt:
        logging.info("Ended by Ctrl-C.")


if __name__ == "__main__":
    main()
