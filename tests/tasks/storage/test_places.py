"""Local and remote places behave alike: whole writes, no overwriting, listings that are up to date."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from prefect_huggingface.tasks.errors import TableError
from prefect_huggingface.tasks.storage.places import Place, find_places
from support.s3_servers import serve_s3


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    pytest.importorskip("moto", reason="needs moto[server]")
    pytest.importorskip("s3fs")
    with serve_s3("places") as url:
        yield url


@pytest.fixture(params=["local", "memory", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "local":
        return Place.of(tmp_path)
    root = "memory://places" if request.param == "memory" else request.getfixturevalue("s3")
    return Place.of(f"{root}/{tmp_path.name}")


def test_writing_listing_and_removing(folder: Place) -> None:
    file = folder.child("deep").child("a.txt")
    assert not file.exists()
    assert folder.child("deep").names() == []
    file.write(b"one")
    file.write(b"two")
    folder.child("deep").child("b.txt").write(b"")

    assert file.read() == b"two"
    assert folder.child("deep").names() == ["a.txt", "b.txt"]
    assert folder.child("deep").is_folder()
    assert file.info()["size"] == 3
    assert (file.name, file.parent.name) == ("a.txt", "deep")
    with pytest.raises(FileNotFoundError):
        folder.child("none").read()
    folder.child("deep").remove()
    folder.child("deep").remove()
    assert not file.exists()


def test_publishing_is_all_or_nothing(folder: Place) -> None:
    target = folder.child("out.txt")
    with pytest.raises(ZeroDivisionError), target.published() as path:
        path.write_text("half")
        raise ZeroDivisionError
    assert not target.exists()
    with target.published() as path:
        path.write_text("whole")
    assert target.read() == b"whole"
    with pytest.raises(TableError, match="exists already"), target.published() as path:
        path.write_text("other")
    assert target.read() == b"whole"
    with target.published(replace=True) as path:
        path.write_text("other")
    assert target.read() == b"other"
    assert [place.name for place in find_places(folder.url)] == ["out.txt"]


def test_folders_and_patterns(folder: Place) -> None:
    for name in ("b.csv", "a.csv", "_done", ".hidden.csv", "c.txt", "sub/d.csv"):
        folder.child(name).write(b"x")
    assert [place.name for place in find_places(folder.url)] == ["a.csv", "b.csv", "c.txt"]
    found = find_places(f"{folder.url}/*.csv")
    assert [place.name for place in found] == ["a.csv", "b.csv"]
    assert [place.read() for place in found] == [b"x", b"x"]


def test_the_marker_of_a_folder_is_none_of_its_files(s3: str) -> None:
    import fsspec

    folder = Place(f"{s3}/marked")
    folder.child("a.csv").write(b"x")
    folder.child("year=2024").child("b.csv").write(b"x")
    for marker in ("marked/", "marked/year=2024/"):  # as the console of S3 makes them
        fsspec.filesystem("s3").pipe_file(f"{s3}/{marker}", b"")
    assert [place.name for place in find_places(folder.url)] == ["a.csv", "b.csv"]


def test_a_file_behind_http_that_was_rewritten_has_another_version(tmp_path: Path) -> None:
    pytest.importorskip("aiohttp")
    from functools import partial
    from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
    from threading import Thread

    (tmp_path / "rows.csv").write_text("id\n1\n")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(tmp_path)))
    Thread(target=server.serve_forever, daemon=True).start()
    place = Place(f"http://127.0.0.1:{server.server_address[1]}/rows.csv")
    first = place.version()
    assert place.version() == first
    os.utime(tmp_path / "rows.csv", (1, 1))
    assert place.version() != first
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("error", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_links_shows_whole_files_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    """As SMB, exFAT and buckets behind FUSE have none. A process may be killed at any call to the system."""

    def refuse(*_: object) -> None:
        raise OSError(error, os.strerror(error))

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    target = Place.of(tmp_path / "out.txt")
    monkeypatch.setattr(os, "link", refuse)
    with monkeypatch.context() as killed:
        killed.setattr(os, "replace", die)
        killed.setattr(Path, "read_bytes", die)  # an output need not fit into the memory
        for write in (lambda: target.create(b"a"), lambda: publish(target, b"a")):
            with pytest.raises(KeyboardInterrupt):
                write()
            assert not target.exists()
    publish(target, b"whole")
    assert target.read() == b"whole"
    with pytest.raises(TableError, match="exists already"):
        publish(target, b"other")
    assert not target.create(b"other")
    assert target.read() == b"whole"
    assert target.parent.child("record").create(b"1")
    assert sorted(os.listdir(tmp_path)) == ["out.txt", "record"]


def publish(place: Place, content: bytes) -> None:
    with place.published() as path:
        path.write_bytes(content)


def test_published_files_have_the_usual_permissions(tmp_path: Path) -> None:
    with Place.of(tmp_path / "a").published() as path:
        path.write_text("x")
    (tmp_path / "b").write_text("x")
    assert os.stat(tmp_path / "a").st_mode == os.stat(tmp_path / "b").st_mode
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Place.of("x/y.csv").url == str(tmp_path / "x/y.csv")
    assert Place.of(f"file://{tmp_path}/y.csv").url == str(tmp_path / "y.csv")
    with pytest.raises(TableError, match="nosuchthing"):
        Place.of("nosuchthing://a/b").exists()
