"""The log of the Prefect run that this library works for, also for what the libraries below say.

Prefect keeps the lines of other loggers out of a run's log unless their names are in an environment variable before
the process starts. Here the warnings of the libraries and all lines of this one get there while a run of this library
is at work, and only once where that variable names them too. Progress bars are no log lines and stay out.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from prefect.context import FlowRunContext, TaskRunContext
from prefect.exceptions import MissingContextError
from prefect.logging import get_logger, get_run_logger
from prefect.logging.handlers import APILogHandler

RunLog = logging.Logger | logging.LoggerAdapter[logging.Logger]

OWN_LOGGER = "prefect.prefect_huggingface"
LOGGERS = (OWN_LOGGER, "transformers", "huggingface_hub", "optimum", "nncf", "openvino")
_lock = threading.Lock()
_users = 0
CLIENT_LOGGERS = (
    "httpx", "httpcore", "httpcore.connection", "httpcore.http11", "httpcore.http2", "httpcore.proxy", "httpcore.socks",
    "huggingface_hub", "huggingface_hub.file_download", "huggingface_hub.utils._http",
)  # fmt: skip
_QUERY = re.compile(r"(https?://[^\s?'\"]+)\?[^\s'\"]+")
_BEARER = re.compile(r"(?i)(bearer\s+)[^\s'\"]+")
_SIGNATURE = re.compile(r"(?i)((?:x-amz-)?(?:signature|credential|security-token|policy)=)[^\s&'\"]+")
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{10,}")
# A hostile server can put anything into its headers, so the log of the transport goes without them.
_HEADERS = re.compile(r"(return_value=\(b'HTTP[^\[]*)\[.*\]", re.DOTALL)


class RunLogHandler(APILogHandler):
    """Sends lines to the run that they belong to. Lines of no run are dropped."""

    def emit(self, record: logging.LogRecord) -> None:
        """Send a line, unless another handler does. What a library tells at INFO is not for the users of this one."""
        ours = record.name.startswith(OWN_LOGGER)
        if (ours or record.levelno >= logging.WARNING) and _run_is_known() and not _is_sent_already(record.name, self):
            super().emit(record)


_handler = RunLogHandler(logging.INFO)


def run_log() -> RunLog:
    """Return the logger of the run, so that people see the lines in Prefect's UI; outside a run, a plain one."""
    try:
        return get_run_logger()
    except MissingContextError:
        return get_logger("prefect_huggingface")


@contextmanager
def library_logs() -> Iterator[None]:
    """Have the lines of the libraries in the log of the run, for the time of the block."""
    _count(1)
    try:
        yield
    finally:
        _count(-1)


def _count(change: int) -> None:
    global _users
    with _lock:
        _users += change
        for name in LOGGERS:
            if _users:
                logging.getLogger(name).addHandler(_handler)  # adding it again does nothing
            else:
                logging.getLogger(name).removeHandler(_handler)


def _run_is_known() -> bool:
    flow_run, task_run = FlowRunContext.get(), TaskRunContext.get()
    if flow_run is not None and flow_run.flow_run is not None:
        return True
    return task_run is not None and task_run.task_run.flow_run_id is not None


def _is_sent_already(name: str, own: logging.Handler) -> bool:
    """Tell whether a logger or one above it has another handler for Prefect's API."""
    logger: logging.Logger | None = logging.getLogger(name)
    while logger is not None:
        if any(isinstance(handler, APILogHandler) and handler is not own for handler in logger.handlers):
            return True
        logger = logger.parent if logger.propagate else None
    return False


def redact(text: str) -> str:
    """Return a text without tokens, without headers of answers and without the queries of addresses."""
    text = _QUERY.sub(r"\1?...", _HEADERS.sub(r"\1[...]", text))
    return _TOKEN.sub("hf_...", _SIGNATURE.sub(r"\1...", _BEARER.sub(r"\1...", text)))


class RedactionFilter(logging.Filter):
    """Log filter that redacts every line and drops none."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Redact the message in place."""
        record.msg, record.args = redact(record.getMessage()), ()
        return True


_FILTER = RedactionFilter()


def redact_client_logs() -> None:
    """Redact the logs of the HTTP clients of this process from now on. Calling it again changes nothing."""
    for name in CLIENT_LOGGERS:
        logging.getLogger(name).addFilter(_FILTER)
