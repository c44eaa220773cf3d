"""The fault table: each fault is overcome or becomes a typed error in bounded time, and no byte is sent needlessly."""

from __future__ import annotations

import hashlib
import time

import pytest

from prefect_huggingface.tasks.downloads import download_model
from prefect_huggingface.tasks.hub_errors import (
    AccessDeniedError,
    CorruptFileError,
    HubUnavailableError,
    InvalidTokenError,
    MissingFileError,
    RateLimitedError,
    RepositoryNotFoundError,
)
from support.hub_models import MEGABYTE, check_snapshot, hub_model, model_files

SIZE = 6 * MEGABYTE
WEIGHTS = "model.safetensors"


def published(store):
    """Return what a reader of the store would take for a part of a snapshot."""
    manifests = list(store.rglob("manifests/*.json"))
    return manifests + [p for p in store.rglob("snapshots/*/*") if p.name != ".lease"]


def download(hub, store, seconds=15.0, **options):
    """Download through the task, within a time, and return the snapshot."""
    started = time.monotonic()
    try:
        return download_model.fn(hub_model(hub, store, **options))
    finally:
        assert time.monotonic() - started < seconds


def check_recovery(hub, store, **options):
    files = model_files(SIZE)
    hub.create("org/model", files)
    check_snapshot(download(hub, store, **options).path, files)


def check_failure(hub, store, expected, **options):
    """Check that the download fails as expected, publishes nothing, and later fetches only what is missing."""
    files = model_files(SIZE)
    hub.create("org/model", files)
    with pytest.raises(expected) as caught:
        download(hub, store, **options)
    assert type(caught.value) is expected
    assert published(store) == []
    name = hashlib.sha256(files[WEIGHTS]).hexdigest()
    kept = sum(p.stat().st_size for p in [*store.rglob(f"partials/{name}"), *store.rglob(f"blobs/{name}")])
    hub.journal.clear()
    check_snapshot(download(hub, store).path, files)
    assert hub.journal.sent(WEIGHTS, "cdn") == SIZE - kept
    return caught.value


def test_cut_once_goes_on_where_it_stopped(hub, tmp_path):
    hub.fault("cut", after=1_234_567)
    check_recovery(hub, tmp_path)
    assert [r.start for r in hub.journal.gets(place="cdn")] == [0, 1_234_567]
    assert hub.journal.sent(place="cdn") == SIZE


def test_cut_again_and_again_goes_on_as_long_as_there_is_progress(hub, tmp_path):
    hub.fault("cut", after=MEGABYTE + 1, times=None)
    check_recovery(hub, tmp_path, settings={"max_attempts": 2})
    assert len(hub.journal.gets(place="cdn")) == 6
    assert hub.journal.sent(place="cdn") == SIZE


@pytest.mark.parametrize("after", [0, 1000])
def test_cut_for_ever_is_an_error(hub, tmp_path, after):
    hub.fault("cut", after=after, times=None)
    check_failure(hub, tmp_path, HubUnavailableError)


def test_a_small_file_that_is_cut_goes_on_too(hub, tmp_path):
    hub.fault("cut", "resolve", path="/config.json", after=5)
    check_recovery(hub, tmp_path)
    assert [r.start for r in hub.journal.gets("/config.json", "resolve")] == [0, 5]


@pytest.mark.parametrize("place", ["api", "resolve", "cdn"])
def test_a_stall_before_the_answer_is_given_up_and_tried_again(hub, tmp_path, place):
    hub.fault("stall", place)
    check_recovery(hub, tmp_path)


@pytest.mark.parametrize("place", ["api", "resolve", "cdn"])
def test_a_stall_for_ever_is_an_error(hub, tmp_path, place):
    hub.fault("stall", place, times=None)
    error = check_failure(hub, tmp_path, HubUnavailableError, settings={"timeout_seconds": 0.5, "max_attempts": 2})
    assert error.transient


def test_a_stall_in_the_middle_goes_on_where_it_stopped(hub, tmp_path):
    hub.fault("stall_body", after=2 * MEGABYTE)
    check_recovery(hub, tmp_path)
    assert hub.journal.sent(place="cdn") == SIZE


def test_a_file_that_only_drips_is_read_on_anew(hub, tmp_path):
    hub.fault("drip")
    check_recovery(hub, tmp_path)
    assert hub.journal.sent(place="cdn") <= SIZE + 100


def test_dripping_for_ever_is_an_error(hub, tmp_path):
    hub.fault("drip", times=None)
    check_failure(hub, tmp_path, HubUnavailableError)


def test_an_answer_of_the_api_that_only_drips_is_given_up(hub, tmp_path):
    hub.fault("drip", "api")
    check_recovery(hub, tmp_path, settings={"timeout_seconds": 0.2})


def test_a_truncated_answer_is_noticed_and_continued(hub, tmp_path):
    hub.fault("truncate", after=3 * MEGABYTE)
    check_recovery(hub, tmp_path)
    assert hub.journal.sent(place="cdn") == SIZE


def test_truncated_for_ever_is_an_error(hub, tmp_path):
    hub.fault("truncate", after=100, times=None)
    check_failure(hub, tmp_path, HubUnavailableError)


@pytest.mark.parametrize(("place", "path"), [("cdn", WEIGHTS), ("resolve", "/config.json")])
def test_corruption_of_the_same_length_is_noticed_and_read_again(hub, tmp_path, place, path):
    hub.fault("corrupt", place, path=path, after=7)
    check_recovery(hub, tmp_path)
    assert len(hub.journal.gets(path, place)) == 2


def test_corruption_for_ever_is_an_error_and_nothing_of_it_stays(hub, tmp_path):
    hub.fault("corrupt", after=5 * MEGABYTE, times=None)
    error = check_failure(hub, tmp_path, CorruptFileError)
    assert WEIGHTS in str(error)
    assert not error.transient


def test_a_server_that_ignores_ranges_is_read_from_the_start(hub, tmp_path):
    hub.fault("cut", after=MEGABYTE)
    hub.fault("ignore_range", skip=0)
    check_recovery(hub, tmp_path)


@pytest.mark.parametrize("wrong", ["bytes 0-99/6291456", "bytes 1048576-6291455/7", "nonsense"])
def test_a_wrong_range_is_not_appended(hub, tmp_path, wrong):
    hub.fault("cut", after=MEGABYTE)
    hub.fault("headers", headers={"content-range": wrong})
    check_recovery(hub, tmp_path)


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
@pytest.mark.parametrize("place", ["api", "resolve", "cdn"])
def test_a_status_that_passes_is_tried_again(hub, tmp_path, place, status):
    hub.fault("status", place, status=status)
    check_recovery(hub, tmp_path)


def test_a_status_in_the_middle_of_a_file_costs_no_bytes(hub, tmp_path):
    hub.fault("cut", after=2 * MEGABYTE)
    hub.fault("status", status=503, skip=0)
    check_recovery(hub, tmp_path)
    assert hub.journal.sent(place="cdn") == SIZE


@pytest.mark.parametrize(
    ("place", "status", "expected"),
    [
        ("api", 401, RepositoryNotFoundError),
        ("api", 403, AccessDeniedError),
        ("api", 404, RepositoryNotFoundError),
        ("api", 408, HubUnavailableError),
        ("api", 429, RateLimitedError),
        ("api", 500, HubUnavailableError),
        ("api", 503, HubUnavailableError),
        ("resolve", 401, RepositoryNotFoundError),
        ("resolve", 403, AccessDeniedError),
        ("resolve", 429, RateLimitedError),
        ("resolve", 500, HubUnavailableError),
        ("cdn", 403, HubUnavailableError),
        ("cdn", 404, HubUnavailableError),
        ("cdn", 429, RateLimitedError),
        ("cdn", 500, HubUnavailableError),
    ],
)
def test_a_status_that_stays_is_an_error_of_its_kind(hub, tmp_path, place, status, expected):
    hub.fault("status", place, status=status, times=None)
    error = check_failure(hub, tmp_path, expected)
    assert error.status == status
    assert error.transient == (status in (408, 429, 500, 503) or place == "cdn")


def test_a_missing_file_is_an_error_of_its_own(hub, tmp_path):
    hub.fault("status", "resolve", path=WEIGHTS, status=404, headers={"X-Error-Code": "EntryNotFound"}, times=None)
    assert WEIGHTS in str(check_failure(hub, tmp_path, MissingFileError))


def test_a_refused_token_is_an_error_of_its_own(hub, tmp_path):
    hub.create("org/model", model_files(1000))
    with pytest.raises(InvalidTokenError, match="does not accept the token"):
        download(hub, tmp_path, token="hf_unknown")
    assert len(hub.journal.requests) == 1


@pytest.mark.parametrize("headers", [{"Retry-After": "1"}, {"RateLimit": '"api";r=0;t=0'}])
@pytest.mark.parametrize("place", ["api", "resolve", "cdn"])
def test_the_wait_that_the_server_asks_for_is_kept(hub, tmp_path, place, headers):
    hub.fault("status", place, status=429, headers=headers)
    started = time.monotonic()
    check_recovery(hub, tmp_path)
    assert time.monotonic() - started >= 1.0


@pytest.mark.parametrize("headers", [{"Retry-After": "1800"}, {"RateLimit": '"api";r=0;t=1799'}])
def test_a_long_wait_is_not_slept_but_told(hub, tmp_path, headers):
    hub.fault("status", "api", status=429, headers=headers)
    error = check_failure(hub, tmp_path, RateLimitedError, seconds=3)
    assert error.wait_seconds == 1800.0
    assert "1800 seconds" in str(error)


@pytest.mark.parametrize("place", ["api", "resolve", "cdn"])
def test_a_failure_within_the_rate_limit_is_tried_again_at_once(hub, tmp_path, place):
    hub.fault("status", place, status=503, headers={"RateLimit": '"api";r=489;t=189'})
    check_recovery(hub, tmp_path)


def test_the_date_of_retry_after_is_understood(hub, tmp_path):
    when = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 3600))
    hub.fault("status", "api", status=503, headers={"Retry-After": when})
    assert 3500 < check_failure(hub, tmp_path, HubUnavailableError, seconds=3).wait_seconds <= 3600


def test_each_attempt_asks_for_a_new_signed_address(hub, tmp_path):
    hub.fault("cut", after=2 * MEGABYTE)
    hub.fault("status", status=403)
    check_recovery(hub, tmp_path)
    assert len(hub.signatures) == 3
    assert hub.journal.sent(place="cdn") == SIZE


def test_an_address_that_has_always_expired_is_an_error(hub, tmp_path):
    hub.signature_seconds = -1.0
    hub.create("org/model", model_files(SIZE))
    with pytest.raises(HubUnavailableError, match="status 403"):
        download(hub, tmp_path)
    assert len(hub.signatures) == 3


def test_one_failure_stops_the_other_files_soon(hub, tmp_path):
    shards = {f"model-0000{n}-of-00002.safetensors": b"x" * SIZE for n in (1, 2)}
    hub.create("org/model", {**shards, "config.json": b"{}", "model.safetensors.index.json": b"{}"})
    hub.fault("stall_body", path="00001", after=MEGABYTE, times=None)
    hub.fault("status", "resolve", path="/config.json", status=403, times=None)
    with pytest.raises(AccessDeniedError):
        download(hub, tmp_path, seconds=4, settings={"timeout_seconds": 2})
