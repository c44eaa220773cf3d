"""Tasks for the life of dedicated Hugging Face endpoints: look at them, resume, pause, scale to zero, and wait."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from prefect_huggingface.blocks import HuggingFaceCredentials
from prefect_huggingface.blocks.credentials import DEFAULT_ENDPOINT
from prefect_huggingface.tasks.errors import EndpointError
from prefect_huggingface.tasks.records import EndpointStatus
from prefect_huggingface.tasks.run_logs import redact_client_logs, run_log

if TYPE_CHECKING:
    from huggingface_hub import HfApi, InferenceEndpoint

# The client of the Hub waits without limit.
CALL_SECONDS = 30.0
MAX_ATTEMPTS = 4
FIRST_WAIT_SECONDS = 0.5
DEFAULT_API = "https://api.endpoints.huggingface.cloud/v2"
FAILED = ("failed", "updateFailed")
AT_REST = ("paused", "scaledToZero")
PASSING_STATUSES = (408, 425, 429, 500, 502, 503, 504)

Call = Callable[["HfApi"], "InferenceEndpoint"]


def read_status(name: str, credentials: HuggingFaceCredentials, namespace: str | None = None) -> EndpointStatus:
    """Return the state of a dedicated endpoint.

    Args:
        name: Name of the endpoint.
        credentials: Token of a user who may manage it.
        namespace: User or organisation that it belongs to. The user of the token when left empty.

    Raises:
        EndpointError: If there is no such endpoint, the token may not manage it, or the service cannot be reached.
    """
    return _ask(name, credentials, lambda api: api.get_inference_endpoint(name, namespace=namespace))


def start(name: str, credentials: HuggingFaceCredentials, namespace: str | None = None) -> EndpointStatus:
    """Resume a dedicated endpoint. One that runs already is left alone.

    Args:
        name: Name of the endpoint.
        credentials: Token of a user who may manage it.
        namespace: User or organisation that it belongs to. The user of the token when left empty.

    Raises:
        EndpointError: If it cannot be resumed.
    """
    return _ask(
        name, credentials, lambda api: api.resume_inference_endpoint(name, namespace=namespace, running_ok=True)
    )


def stop(name: str, credentials: HuggingFaceCredentials, namespace: str | None = None) -> EndpointStatus:
    """Pause a dedicated endpoint. It costs nothing and answers nothing until it is resumed.

    Args:
        name: Name of the endpoint.
        credentials: Token of a user who may manage it.
        namespace: User or organisation that it belongs to. The user of the token when left empty.

    Raises:
        EndpointError: If it cannot be paused.
    """
    return _ask(name, credentials, lambda api: api.pause_inference_endpoint(name, namespace=namespace))


def put_to_sleep(name: str, credentials: HuggingFaceCredentials, namespace: str | None = None) -> EndpointStatus:
    """Scale a dedicated endpoint to zero. It costs nothing until the next request wakes it.

    Args:
        name: Name of the endpoint.
        credentials: Token of a user who may manage it.
        namespace: User or organisation that it belongs to. The user of the token when left empty.

    Raises:
        EndpointError: If it cannot be scaled to zero.
    """
    return _ask(name, credentials, lambda api: api.scale_to_zero_inference_endpoint(name, namespace=namespace))


def wait_until_running(
    name: str,
    credentials: HuggingFaceCredentials,
    namespace: str | None = None,
    timeout_seconds: float = 1800,
    poll_seconds: float = 5,
) -> EndpointStatus:
    """Wait until a dedicated endpoint runs, and return its state with its address. The log shows the progress.

    Args:
        name: Name of the endpoint.
        credentials: Token of a user who may manage it.
        namespace: User or organisation that it belongs to. The user of the token when left empty.
        timeout_seconds: How long to wait at most.
        poll_seconds: Time between two looks.

    Raises:
        EndpointError: If it fails, is paused or scaled to zero, or does not run in time.
    """
    began = time.monotonic()
    shown = None
    while True:
        found = read_status(name, credentials, namespace)
        waited = time.monotonic() - began
        if found.status == "running" and found.url:
            return found
        if found.status in FAILED:
            text = f"Endpoint {name!r} has failed ({found.status}). Look at its log on the Hub, and resume it."
            raise EndpointError(text, name=name, status=found.status)
        if found.status in AT_REST:
            raise EndpointError(
                f"Endpoint {name!r} is {found.status}. Resume it first.", name=name, status=found.status
            )
        if waited + poll_seconds > timeout_seconds:
            text = f"Endpoint {name!r} is {found.status} and not running after {waited:.0f} s. Raise `timeout_seconds`."
            raise EndpointError(text, name=name, status=found.status)
        if found.status != shown:
            run_log().info("Endpoint %s is %s after %.0f s.", name, found.status, waited)
            shown = found.status
        time.sleep(poll_seconds)


def _ask(name: str, credentials: HuggingFaceCredentials, call: Call) -> EndpointStatus:
    """Return the state that a call to the service gives; a failure that passes is tried again."""
    redact_client_logs()
    api = _open(name, credentials)
    for attempt in range(1, MAX_ATTEMPTS + 1):
        try:
            return _to_status(_bounded(lambda: call(api)))
        except Exception as exc:
            error, passing = _explain(exc, name)
        if not passing or attempt == MAX_ATTEMPTS:
            raise error
        time.sleep(FIRST_WAIT_SECONDS * 2 ** (attempt - 1))
    raise AssertionError("unreachable")


def _open(name: str, credentials: HuggingFaceCredentials) -> HfApi:
    from huggingface_hub import constants

    if credentials.get_token() is None:
        text = f"Endpoint {name!r} cannot be managed without a token. Put one into `credentials`."
        raise EndpointError(text, name=name)
    if not credentials.is_default_hub and constants.INFERENCE_ENDPOINTS_ENDPOINT == DEFAULT_API:
        place = repr(credentials.endpoint)
        text = f"The token of {place} is not sent to {DEFAULT_API!r}. Use credentials of {DEFAULT_ENDPOINT!r}."
        raise EndpointError(text, name=name)
    return credentials.get_client()


def _bounded(call: Callable[[], Any]) -> Any:
    """Return what a call returns, or raise `TimeoutError` after a while. Its thread is then left behind."""
    outcome: queue.SimpleQueue[tuple[Any, Exception | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            outcome.put((call(), None))
        except Exception as exc:
            outcome.put((None, exc))

    threading.Thread(target=run, name="endpoint-call", daemon=True).start()
    try:
        result, error = outcome.get(timeout=CALL_SECONDS)
    except queue.Empty:
        raise TimeoutError from None
    if error is not None:
        raise error
    return result


def _explain(exc: Exception, name: str) -> tuple[EndpointError, bool]:
    """Return the error of this library for an exception, and whether the same call may work later."""
    status = getattr(getattr(exc, "response", None), "status_code", None)
    if status is None:
        kind = (
            "did not answer in time" if "Timeout" in type(exc).__name__ else f"cannot be asked ({type(exc).__name__})"
        )
        text = f"The service of endpoint {name!r} {kind}. Try again later."
        return EndpointError(text, name=name), isinstance(exc, TimeoutError) or "Transport" in _names(exc)
    words = {
        401: "does not accept the token. Put a valid one into `credentials`.",
        403: "gives this token no right to manage it. Use a token with write access to inference endpoints.",
        404: "does not know it. Correct `name` and `namespace`.",
    }.get(status, f"refuses with status {status}. Look at the endpoint on the Hub.")
    return EndpointError(
        f"Endpoint {name!r}: the service {words}", name=name, status=status
    ), status in PASSING_STATUSES


def _names(exc: Exception) -> str:
    return " ".join(kind.__name__ for kind in type(exc).__mro__)


def _to_status(found: InferenceEndpoint) -> EndpointStatus:
    return EndpointStatus(
        name=found.name,
        namespace=found.namespace,
        status=str(getattr(found.status, "value", found.status)),
        url=found.url,
        repo_id=found.repository,
        revision=found.revision,
    )


_settings: dict[str, Any] = {"cache_policy": NO_CACHE}

get_endpoint = task(name="get-endpoint", **_settings)(read_status)
resume_endpoint = task(name="resume-endpoint", **_settings)(start)
pause_endpoint = task(name="pause-endpoint", **_settings)(stop)
scale_endpoint_to_zero = task(name="scale-endpoint-to-zero", **_settings)(put_to_sleep)
wait_for_endpoint = task(name="wait-for-endpoint", **_settings)(wait_until_running)
