"""Start a model server.

    prefect-huggingface-server --block default --block summarizer
    prefect-huggingface-server --block all --host 0.0.0.0 --api-key-file keys.txt
    prefect-huggingface-server --model HuggingFaceTB/SmolLM2-135M-Instruct --weight-format int8

The blocks are those of the Prefect server of `PREFECT_API_URL`; with `--model` no Prefect server is needed.
"""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from prefect_huggingface.blocks import LocalModel
from prefect_huggingface.deployments.model_server.models import SLUG, ServedModel, ServedModels
from prefect_huggingface.deployments.model_server.settings import ServerSettings, parse_arguments, read_keys


def load_blocks(names: Sequence[str]) -> Iterator[ServedModel]:
    """Yield the models of saved blocks.

    Raises:
        SystemExit: If there is no such block, or no Prefect server.
    """
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL

    if not PREFECT_API_URL.value():
        raise SystemExit("Blocks need a Prefect server. Set PREFECT_API_URL to its address, or use --model.")
    if every := "all" in names:
        with get_client(sync_client=True) as client:
            names = [str(each.name) for each in client.read_block_documents_by_type(SLUG)]
        if not names:
            raise SystemExit("No block of a local model is saved. Save one with `make blocks`, or use --model.")
    for name in dict.fromkeys(name.removeprefix(f"{SLUG}/") for name in names):
        try:
            yield ServedModel(name, LocalModel.load(name))  # type: ignore[arg-type]
        except (ValueError, RuntimeError) as exc:  # the latter for values that do not go together
            text = f"There is no valid block {SLUG}/{name}. Save it, or use --block all. ({exc.__cause__ or exc})"
            if not every:
                raise SystemExit(text) from None
            logging.warning("%s", text)


def load_models(settings: ServerSettings) -> Iterator[ServedModel]:
    """Yield the models that are no blocks."""
    names = ("weight_format", "backend", "task", "device")
    given: dict[str, Any] = {name: value for name in names if (value := getattr(settings, name)) is not None}
    for model_id in settings.model:
        path = Path(model_id).expanduser()
        yield ServedModel(path.resolve().name if path.exists() else model_id, LocalModel(model_id=model_id, **given))


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve until SIGTERM or Ctrl-C."""
    settings = parse_arguments(arguments)
    # Also before uvicorn listens to it; at its end, this runs the exit handlers, which close the engines.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    keys = read_keys(settings.api_key_file, settings.host)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)-7s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    import uvicorn

    from prefect_huggingface.deployments.model_server.app import create_app
    from prefect_huggingface.tasks.engines.registry import set_memory_budget

    models = ServedModels([*(load_blocks(settings.block) if settings.block else ()), *load_models(settings)])
    set_memory_budget(settings.memory_gb)
    with suppress(ImportError, ValueError, OSError):  # Windows has no such limit, macOS calls its limit infinite
        import resource

        # Every connection is an open file.
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    config = uvicorn.Config(
        create_app(models, settings, keys), settings.host, settings.port, log_config=None, access_log=False, ws="none",
        server_header=False, proxy_headers=False, timeout_keep_alive=75,
        timeout_graceful_shutdown=settings.drain_seconds,
    )  # fmt: skip
    logging.info("Serving %s at http://%s:%d/v1.", models, settings.host, settings.port)
    with suppress(KeyboardInterrupt):
        uvicorn.Server(config).run()


if __name__ == "__main__":
    main()
