"""A store that does not answer is an error that names the URL and the remedy, and holds nothing of its request."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from prefect_huggingface.tasks.batching.job import BatchOptions, plan_job
from prefect_huggingface.tasks.batching.output import plan_output, publish_output
from prefect_huggingface.tasks.batching.run import BatchMonitor, open_run
from prefect_huggingface.tasks.batching.shard import process_shard
from prefect_huggingface.tasks.errors import TableError
from prefect_huggingface.tasks.storage.journals import ownership
from prefect_huggingface.tasks.storage.journals.journal import Journal, JournalCounts
from prefect_huggingface.tasks.storage.places import Place, find_places, reach_hub
from prefect_huggingface.tasks.storage.tables.inputs import inspect_table
from support.instant_engines import InstantEngine
from support.journals import claim_journal
from support.ports import free_port

TOKEN = "hf_canarycanarycanarycanary"
OPERATIONS: dict[str, Callable[[Place], Any]] = {
    "exists": Place.exists, "is_folder": Place.is_folder, "info": Place.info, "read": Place.read,
    "open": lambda place: place.open().read(), "ahead": lambda place: place.open(ahead=True).read(),
    "version": Place.version, "names": Place.names, "write": lambda place: place.write(b"x"),
    "create": lambda place: place.create(b"x"), "remove": Place.remove, "find": lambda place: find_places(place.url),
    "inspect": lambda place: inspect_table(place.url),
    "pattern": lambda place: find_places(f"{place.parent.url}/*.csv"),
}  # fmt: skip
EXPLAINED = {"hf": "info", "http": "read", "s3": "info"}  # what is sure to ask the store


@pytest.fixture(params=["hf", "http", "s3"])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    nobody = f"http://127.0.0.1:{free_port()}"
    if request.param == "http":
        pytest.importorskip("aiohttp")
        yield Place(f"{nobody}/rows.csv")
    elif request.param == "hf":
        with reach_hub(nobody, TOKEN):
            yield Place("hf://datasets/org/questions/rows.csv")
    else:
        pytest.importorskip("s3fs")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": nobody, "skip_instance_cache": True})
        yield Place("s3://bucket/rows.csv")


@pytest.mark.parametrize("operation", OPERATIONS)
def test_whatever_is_asked_of_a_store_that_is_away(place: Place, operation: str) -> None:
    kind, error = place.url.partition("://")[0], None
    try:
        OPERATIONS[operation](place)
    except (TableError, FileNotFoundError) as exc:
        error = exc
    if operation == EXPLAINED[kind]:
        remedy = "Give credentials" if kind == "s3" else "Check the URL, the network and the store"
        assert remedy in str(error)
    if error is not None:  # some take no answer for "there is none"
        assert error.__cause__ is error.__context__ is None
        assert place.parent.url in str(error)
        assert TOKEN not in str(error)


@pytest.mark.parametrize("operation", ["info", "read", "open", "ahead", "version", "create"])
def test_the_signature_of_a_url_is_not_in_what_is_said_of_it(operation: str) -> None:
    pytest.importorskip("aiohttp")
    place = Place(f"http://127.0.0.1:{free_port()}/rows.csv?X-Amz-Signature=CANARY")
    with pytest.raises((TableError, FileNotFoundError), match=r"/rows\.csv\?\.\.\.' (cannot be|is not)") as error:
        OPERATIONS[operation](place)
    assert "CANARY" not in str(error.value)


class RestlessFileSystem(MemoryFileSystem):  # type: ignore[misc]
    """A store in memory that does not list its files, or take one, so many times."""

    protocol = "restless"
    store: dict[str, Any] = {}
    pseudo_dirs = [""]
    refusals = 0

    def ls(self, *arguments: Any, **options: Any) -> Any:
        self._refuse()
        return super().ls(*arguments, **options)

    def pipe_file(self, *arguments: Any, **options: Any) -> Any:
        self._refuse()
        return super().pipe_file(*arguments, **options)

    def open(self, path: str, *arguments: Any, **options: Any) -> Any:
        file = super().open(path, *arguments, **options)
        return BrokenFile(file.getvalue()) if path.endswith(".broken") else file

    def _refuse(self) -> None:
        if RestlessFileSystem.refusals:
            RestlessFileSystem.refusals -= 1
            raise ConnectionResetError("The store is away.")


class BrokenFile(io.BytesIO):
    """A file whose store goes away when it is read."""

    def read(self, *_: Any) -> Any:
        raise ConnectionResetError("The store is away.")

    readinto = read


@pytest.fixture
def restless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    fsspec.register_implementation("restless", RestlessFileSystem, clobber=True)
    monkeypatch.setattr(Journal, "poll_seconds", 0.01)
    yield f"restless://{tmp_path.name}"
    RestlessFileSystem.refusals = 0


@pytest.mark.parametrize("size", [(), (-1,), (1,)])
def test_a_store_that_goes_away_while_a_file_is_read(restless: str, size: tuple[int, ...]) -> None:
    place = Place(f"{restless}/rows.broken")
    place.write(b"rows")
    with place.open() as file, pytest.raises(TableError, match="cannot be reached"):
        file.read(*size)


def test_a_moment_without_the_store_does_not_end_a_shard(tmp_path: Path, restless: str) -> None:
    class Engine(InstantEngine):
        def submit(self, *arguments: Any) -> Any:
            if not asked:
                RestlessFileSystem.refusals = 3
            asked.append(arguments)
            return super().submit(*arguments)

    asked: list[Any] = []
    source = tmp_path / "in.csv"
    source.write_text("id\n" + "".join(f"{number}\n" for number in range(100)))
    output = plan_output(str(source), f"{restless}/out.jsonl")
    journal, job = Journal.beside(output.destination), plan_job(str(source), "{id}")
    run = open_run(claim_journal(journal), job, BatchOptions(max_concurrency=2))
    assert process_shard([Engine(seconds=0.01)], run.shards[0]).complete
    assert RestlessFileSystem.refusals == 0
    assert publish_output(job, run.owner, output).statuses == {"ok": 100}


def test_a_stop_reaches_the_shards_when_the_store_is_back(restless: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "LEASE_SECONDS", 0.5)
    owner = claim_journal(Journal(Place(f"{restless}/j")))
    RestlessFileSystem.refusals = 3
    owner.request_stop("Test")
    assert RestlessFileSystem.refusals == 0
    assert owner.is_stopped()
    RestlessFileSystem.refusals = 1_000_000
    shards = iter([False, False, True])
    owner.request_stop("Test", lambda: next(shards))  # nobody is left to be asked
    with pytest.raises(TableError, match="cannot be reached"):
        owner.request_stop("Test")


def test_a_store_that_stays_away_ends_the_wait_after_the_time_of_a_lease(
    restless: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ownership, "LEASE_SECONDS", 0.2)
    monitor = BatchMonitor(Journal(Place(f"{restless}/j")), 10, JournalCounts(rows=4))
    first = monitor.measure()
    RestlessFileSystem.refusals = 1
    assert monitor.measure() == first
    assert monitor.measure().finished == first.finished == 4
    RestlessFileSystem.refusals = 1_000_000
    assert monitor.measure().finished == 4
    time.sleep(0.3)
    with pytest.raises(TableError, match="cannot be reached"):
        monitor.measure()
