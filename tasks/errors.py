"""Errors of this library. All are plain and picklable: an error never carries a response, a header or a token.

HuggingFaceTaskError
├── ModelSourceError       a model folder that is missing or is no model
├── PlanError              work that cannot succeed, found before it starts
├── SettingsError          a setting that is unknown or does not go with another one; a ValueError too
├── DownloadError          see `hub_errors` for its kinds
├── ExportError            an export that failed
│   ├── ExportOutOfMemoryError
│   └── QualityError        an export that agrees too little with its source
├── EngineError            an engine that cannot be loaded or used
│   ├── EngineBusyError    a model that does not fit beside those in use
│   ├── GenerationError    one request that failed, where an exception is asked for
│   └── EndpointError      a dedicated endpoint that cannot be managed, or does not get ready
├── ChainError             a prompt chain that cannot be filled in or parsed
├── TableError             an input that cannot be read or an output that cannot be written
├── BatchError             a batch that cannot start or go on
│   └── BatchCancelledError a batch whose run was cancelled in Prefect
"""

from __future__ import annotations

from typing import Any


class HuggingFaceTaskError(Exception):
    """Base of all errors of this library. The message names the value and the remedy."""

    def __init__(self, message: str, **fields: Any) -> None:
        super().__init__(message)
        self.message = message
        self.fields = fields

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.message, self.fields)


def _rebuild(kind: type[HuggingFaceTaskError], message: str, fields: dict[str, Any]) -> HuggingFaceTaskError:
    return kind(message, **fields)


class ModelSourceError(HuggingFaceTaskError):
    """A model folder is missing, or holds no model of the wanted kind."""


class PlanError(HuggingFaceTaskError):
    """The work cannot succeed; nothing was started."""


class SettingsError(HuggingFaceTaskError, ValueError):
    """A setting is unknown, or does not go with another one."""


class DownloadError(HuggingFaceTaskError):
    """A file or a repository could not be downloaded."""


class ExportError(HuggingFaceTaskError):
    """An export failed; nothing was published."""


class ExportOutOfMemoryError(ExportError):
    """The process that made an export was killed, most likely for want of memory."""


class QualityError(ExportError):
    """An export agrees less with its source than it must."""


class EngineError(HuggingFaceTaskError):
    """An engine cannot be loaded or used."""


class EngineBusyError(EngineError):
    """A model does not fit beside the engines that are in use; it does once they are not."""

    transient = True


class GenerationError(EngineError):
    """A request failed."""


class EndpointError(EngineError):
    """A dedicated endpoint cannot be managed, or does not get ready."""


class ChainError(HuggingFaceTaskError):
    """A prompt chain cannot be filled in, or the output of a step is not of its form."""


class TableError(HuggingFaceTaskError):
    """An input cannot be read, or an output cannot be written."""


class BatchError(HuggingFaceTaskError):
    """A batch cannot start or go on."""


class BatchCancelledError(BatchError):
    """The run of a batch was cancelled in Prefect. Its journal keeps what is finished."""
