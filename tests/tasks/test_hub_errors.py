"""The errors of the Hub: picklable, plain, and said in sentences."""

from __future__ import annotations

import inspect
import pickle

import cloudpickle
import httpx
import pytest
from huggingface_hub import errors as client_errors

from prefect_huggingface.tasks import hub_errors
from prefect_huggingface.tasks.errors import DownloadError
from prefect_huggingface.tasks.hub_errors import HubError, RequestContext, attempt, explain

KINDS = [k for _, k in inspect.getmembers(hub_errors, inspect.isclass) if issubclass(k, HubError)]
ABOUT = RequestContext("org/model", "https://hub.example", "main", has_token=True, path="model.safetensors")
SECRETS = ("hf_canary", "SIGNED")


def client_error(kind, status, **headers):
    request = httpx.Request(
        "GET", "https://cdn.example/x?Signature=SIGNED", headers={"Authorization": "Bearer hf_canary"}
    )
    words = "hf_canary echoed by a hostile server https://cdn.example/x?Signature=SIGNED"
    response = httpx.Response(status, headers={"X-Error-Message": words, **headers}, request=request)
    return kind("SIGNED hf_canary", response=response)


RAISED = [
    client_error(client_errors.GatedRepoError, 403, **{"X-Error-Code": "GatedRepo"}),
    client_error(client_errors.RepositoryNotFoundError, 404, **{"X-Error-Code": "RepoNotFound"}),
    client_error(client_errors.RevisionNotFoundError, 404, **{"X-Error-Code": "RevisionNotFound"}),
    client_error(client_errors.RemoteEntryNotFoundError, 404, **{"X-Error-Code": "EntryNotFound"}),
    *(client_error(client_errors.HfHubHTTPError, status) for status in (400, 401, 403, 404, 408, 410, 429, 500, 503)),
    httpx.ConnectError("SIGNED hf_canary"),
    httpx.ReadTimeout("SIGNED hf_canary"),
    httpx.RemoteProtocolError("SIGNED hf_canary"),
    httpx.LocalProtocolError("Illegal header value b'Bearer hf_canary '"),
    httpx.TooManyRedirects("SIGNED"),
    client_errors.OfflineModeIsEnabled("https://cdn.example/x?Signature=SIGNED"),
    client_errors.HFValidationError("hf_canary"),
    ValueError("hf_canary SIGNED"),
    KeyError("hf_canary"),
    OSError(28, "No space left on device", "/store/blob"),
    PermissionError(13, "Permission denied", "/store/blob"),
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_kind_is_a_download_error_that_survives_pickling(kind):
    error = kind("What is wrong. What to do.", repo_id="org/model", status=403, wait_seconds=2.0, page="https://x/y")
    assert isinstance(error, DownloadError)
    for packed in (pickle.dumps(error), cloudpickle.dumps(error)):
        copy = pickle.loads(packed)
        assert type(copy) is kind
        assert (str(copy), copy.fields, copy.transient) == (str(error), error.fields, error.transient)
        assert (copy.repo_id, copy.status, copy.wait_seconds, copy.page) == ("org/model", 403, 2.0, "https://x/y")


@pytest.mark.parametrize("raised", RAISED, ids=lambda raised: f"{type(raised).__name__}")
def test_an_explanation_holds_nothing_of_the_exception(raised):
    def call():
        raise raised

    error = attempt(call, ABOUT)
    assert isinstance(error, HubError)
    packed = cloudpickle.dumps(error).decode("latin1") + repr(error) + str(error) + repr(vars(error))
    assert not [secret for secret in SECRETS if secret in packed]
    assert error.__cause__ is None
    assert error.__context__ is None


@pytest.mark.parametrize("raised", RAISED, ids=lambda raised: f"{type(raised).__name__}")
def test_an_explanation_names_a_value_and_an_action(raised):
    words = str(explain(raised, ABOUT))
    assert words.endswith(".")
    assert any(value in words for value in ("'org/model'", "'https://hub.example'", "/store/blob", "model.safetensors"))
    assert len(words.split(". ")) >= 2


def test_the_tree_of_the_docstring_is_the_tree_of_the_classes():
    drawn = {line.strip("│├└─ ").split(" ")[0] for line in (hub_errors.__doc__ or "").splitlines() if "─" in line}
    assert drawn == {kind.__name__ for kind in KINDS}
