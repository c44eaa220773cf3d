"""Keeps tokens and signed addresses out of the log lines of the HTTP clients."""

from __future__ import annotations

import logging
import re

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
