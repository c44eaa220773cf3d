"""The models that a server offers: loaded once at their first request, and lent for the time of a request."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, suppress
from typing import Any

from prefect.logging import get_logger

from prefect_huggingface.blocks import GenerationOptions, LocalModel
from prefect_huggingface.tasks.engines.base import Engine
from prefect_huggingface.tasks.engines.registry import list_engines, load_engine, unload_idle_engines
from prefect_huggingface.tasks.errors import HuggingFaceTaskError
from prefect_huggingface.tasks.openai_protocol import BodyError

logger = get_logger(__name__)

# A client that waits for longer is told to come back; the loading goes on.
LOAD_WAIT_SECONDS = 60.0
EVICTION_SECONDS = 15.0
# What the client of huggingface_hub sends where an endpoint names no model.
UNNAMED = "dummy"
SLUG = LocalModel.get_block_type_slug()


class ServedModel:
    """One model under its name.

    Attributes:
        name: Name that requests use.
        block: What is loaded.
        names: All names that requests may use.
        engine: Engine while requests use it, or None.
        requests: Number of requests that wait for the model or use it.
        loading: Number of them that wait for it.
        card: What clients are told about it.
    """

    def __init__(self, name: str, block: LocalModel, base: str | None = None) -> None:
        self.name, self.block = name, block
        # An adapter has one name only, the model of a block has three.
        self.names = {name, *((f"{SLUG}/{name}", block.model_id) if base is None else ())}
        self.requests = self.loading = 0
        self.card = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "prefect-huggingface"}
        self.card |= {} if base is None else {"parent": base}
        self.engine: Engine | None = None
        self._load: asyncio.Future[Engine] | None = None

    def variants(self) -> Iterator[ServedModel]:
        """Yield the model with each of its adapters alone, as `NAME:ADAPTER`."""
        for adapter in self.block.adapters:
            block = self.block.model_copy(update={"adapters": [adapter]})
            yield ServedModel(f"{self.name}:{adapter.name}", block, self.name)

    @asynccontextmanager
    async def use(self) -> AsyncIterator[Engine]:
        """Lend the engine; load it first where needed. It may be closed for another model once nobody uses it.

        Raises:
            BodyError: If the model cannot be loaded, or not in time.
        """
        self.requests += 1
        try:
            if self.engine is None or self.engine.failure is not None:
                self.engine = await self._wait_for_engine()
            yield self.engine
        finally:
            self.requests -= 1
            if not self.requests:
                self.engine = None

    async def _wait_for_engine(self) -> Engine:
        """Return the engine. All who ask while it is loaded wait for the same loading."""
        self.loading += 1
        try:
            async with asyncio.timeout(LOAD_WAIT_SECONDS):
                return await asyncio.shield(self.load())
        except TimeoutError:
            text = f"{self.name!r} is being loaded. Try again."
            raise BodyError("model_loading", text, status=503, retry_after=5) from None
        except HuggingFaceTaskError as exc:
            # Another try would load the model again, for minutes maybe.
            status, wait = (503, 10) if getattr(exc, "transient", False) else (500, None)
            text = f"{self.name!r} cannot be loaded: {exc}"
            raise BodyError("model_unavailable", text, status=status, retry_after=wait) from None
        finally:
            self.loading -= 1

    def load(self) -> asyncio.Future[Engine]:
        """Begin to load the engine, once for all who ask meanwhile."""
        if self._load is None:
            self._load = asyncio.ensure_future(asyncio.to_thread(self._load_engine))
            self._load.add_done_callback(self._end_load)
        return self._load

    def _load_engine(self) -> Engine:
        began = time.time()
        engine = load_engine(self.block)
        if any(state.loaded_at >= began for state in list_engines()):
            logger.info("The model %r is ready after %.1f s.", self.name, time.time() - began)
        return engine

    def _end_load(self, load: asyncio.Future[Engine]) -> None:
        self._load = None
        if not load.cancelled() and (error := load.exception()) is not None:
            logger.error("The model %r cannot be loaded: %s", self.name, error)


class ServedModels:
    """All models of a server by their names.

    Raises:
        SystemExit: If two have the same name.
    """

    def __init__(self, models: Iterable[ServedModel]) -> None:
        self._models = [each for model in models for each in (model, *model.variants())]
        if len({model.name for model in self._models}) < len(self._models):
            raise SystemExit(f"Two models have the same name, got {self}. Rename a folder or a block.")

    def __str__(self) -> str:
        return ", ".join(repr(model.name) for model in self._models)

    def __iter__(self) -> Iterator[ServedModel]:
        return iter(self._models)

    @property
    def requests(self) -> int:
        """Number of requests that are not done."""
        return sum(model.requests for model in self._models)

    def find(self, name: str | None) -> ServedModel:
        """Return the model of a request. Where there is only one, it needs no name.

        Raises:
            BodyError: If there is no such model.
        """
        if name in (None, UNNAMED) and len(self._models) == 1:
            return self._models[0]
        for model in self._models:
            if name in model.names:
                return model
        text = f"The model {name!r} is not served here. Use one of {self}, or restart the server if it was saved since."
        raise BodyError("model_not_found", text, "model", status=404)

    def options_of(self, name: Any) -> GenerationOptions | None:
        """Return the options of a model for what a body leaves out, None where there is no model of the name."""
        with suppress(BodyError, TypeError):
            return self.find(name).block.options
        return None


async def evict_idle(minutes: float | None) -> None:
    """Close engines that nobody has used for so long, for ever; none without a time."""
    while minutes is not None:
        await asyncio.sleep(min(minutes * 60, EVICTION_SECONDS))
        if closed := await asyncio.to_thread(unload_idle_engines, minutes * 60):
            logger.info("Closed %d idle model(s).", closed)
