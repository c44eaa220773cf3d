"""The models that a server offers: loaded once at their first request, and lent for the time of a request."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

from prefect.logging import get_logger

from prefect_huggingface.blocks import LocalModel
from prefect_huggingface.tasks.engines.base import Engine
from prefect_huggingface.tasks.engines.registry import list_engines, load_engine, unload_idle_engines
from prefect_huggingface.tasks.errors import EngineError, HuggingFaceTaskError
from prefect_huggingface.tasks.openai_protocol import BodyError

logger = get_logger(__name__)

# A client that waits for longer is told to come back; the loading goes on.
LOAD_WAIT_SECONDS = 60.0
EVICTION_SECONDS = 15.0
# What the client of huggingface_hub sends where an endpoint names no model.
UNNAMED = "dummy"


class ApiError(BodyError):
    """An answer that is an error with a status of its own.

    Attributes:
        status: HTTP status.
        retry_after: Seconds after which the same request may work, or None.
    """

    def __init__(
        self, status: int, code: str, message: str, param: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(code, message, param)
        self.status, self.retry_after = status, retry_after


class ServedModel:
    """One model under its name.

    Attributes:
        name: Name that requests use.
        block: What is loaded.
        base: Name of the model whose adapter this is, or None.
        requests: Number of requests that wait for the model or use it.
        loading: Number of them that wait for it.
    """

    def __init__(self, name: str, block: LocalModel, base: str | None = None) -> None:
        self.name, self.block, self.base = name, block, base
        self.requests = self.loading = 0
        self.created = int(time.time())
        self._engine: Engine | None = None
        self._load: asyncio.Future[Engine] | None = None

    @property
    def names(self) -> set[str]:
        """All names that requests may use."""
        if self.base is not None:
            return {self.name}
        return {self.name, f"{LocalModel.get_block_type_slug()}/{self.name}", self.block.model_id}

    def variants(self) -> Iterator[ServedModel]:
        """Yield the model with each of its adapters alone, as `NAME:ADAPTER`."""
        for adapter in self.block.adapters:
            block = self.block.model_copy(update={"adapters": [adapter]})
            yield ServedModel(f"{self.name}:{adapter.name}", block, self.name)

    @property
    def cache_usage(self) -> float:
        """Share of the KV cache that is in use, 0 to 1."""
        return self._engine.cache_usage if self._engine is not None else 0.0

    @asynccontextmanager
    async def use(self) -> AsyncIterator[Engine]:
        """Lend the engine; load it first where needed. It may be closed for another model once nobody uses it.

        Raises:
            ApiError: If the model cannot be loaded, or not in time.
        """
        self.requests += 1
        try:
            yield self._engine or await self._wait_for_engine()
        finally:
            self.requests -= 1
            if not self.requests:
                self._engine = None

    async def _wait_for_engine(self) -> Engine:
        """Return the engine. All who ask while it is loaded wait for the same loading."""
        self.loading += 1
        try:
            async with asyncio.timeout(LOAD_WAIT_SECONDS):
                return await asyncio.shield(self.load())
        except TimeoutError:
            raise ApiError(503, "model_loading", f"{self.name!r} is being loaded. Try again.", retry_after=5) from None
        except HuggingFaceTaskError as exc:
            passing = isinstance(exc, EngineError) or getattr(exc, "transient", False)
            status, wait = (503, 10) if passing else (500, None)
            message = f"{self.name!r} cannot be loaded: {exc}"
            raise ApiError(status, "model_unavailable", message, retry_after=wait) from None
        finally:
            self.loading -= 1

    def load(self) -> asyncio.Future[Engine]:
        """Begin to load the engine, once for all who ask meanwhile."""
        if self._load is None:
            self._load = asyncio.ensure_future(asyncio.to_thread(self._load_engine))
            self._load.add_done_callback(self._keep)
        return self._load

    def _load_engine(self) -> Engine:
        began = time.time()
        engine = load_engine(self.block)
        if any(state.loaded_at >= began for state in list_engines()):
            logger.info("The model %r is ready after %.1f s.", self.name, time.time() - began)
        return engine

    def _keep(self, load: asyncio.Future[Engine]) -> None:
        self._load = None
        if load.cancelled():
            return
        if (error := load.exception()) is not None:
            logger.error("The model %r cannot be loaded: %s", self.name, error)
        elif self.requests:
            self._engine = load.result()


class ServedModels:
    """All models of a server by their names.

    Raises:
        SystemExit: If two have the same name.
    """

    def __init__(self, models: Iterable[ServedModel]) -> None:
        self._models = [each for model in models for each in (model, *model.variants())]
        names = [model.name for model in self._models]
        if len(set(names)) < len(names):
            raise SystemExit(f"Two models have the same name, got {', '.join(names)}. Rename a folder or a block.")

    def __iter__(self) -> Iterator[ServedModel]:
        return iter(self._models)

    @property
    def requests(self) -> int:
        """Number of requests that are not done."""
        return sum(model.requests for model in self._models)

    def find(self, name: str | None) -> ServedModel:
        """Return the model of a request. Where there is only one, it needs no name.

        Raises:
            ApiError: If there is no such model.
        """
        if name in (None, UNNAMED) and len(self._models) == 1:
            return self._models[0]
        for model in self._models:
            if name in model.names:
                return model
        known = ", ".join(repr(model.name) for model in self._models)
        raise ApiError(404, "model_not_found", f"The model {name!r} is not served here. Use one of {known}.", "model")


def name_of(model_id: str) -> str:
    """Return the name under which a model is served that is no block: its Hub id, or the name of its folder."""
    path = Path(model_id).expanduser()
    return path.resolve().name if path.exists() else model_id


async def evict_idle(minutes: float | None) -> None:
    """Close engines that nobody has used for so long, for ever; none without a time."""
    while minutes is not None:
        await asyncio.sleep(min(minutes * 60, EVICTION_SECONDS))
        if closed := await asyncio.to_thread(unload_idle_engines, minutes * 60):
            logger.info("Closed %d idle model(s).", closed)
