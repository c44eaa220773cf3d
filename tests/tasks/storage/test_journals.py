"""What is in the journal is whole and of the right job, or it is noticed; rows come back in order with flat memory."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from prefect_huggingface.tasks.errors import BatchError
from prefect_huggingface.tasks.storage.journals.journal import Journal
from prefect_huggingface.tasks.storage.journals.rows import JournalRows
from prefect_huggingface.tasks.storage.journals.segments import (
    Answer,
    SegmentError,
    SegmentName,
    decode_segment,
    encode_segment,
    segment_schema,
)
from prefect_huggingface.tasks.storage.journals.writers import JournalWriter
from prefect_huggingface.tasks.storage.places import Place

JOB = "a" * 32


def answer(row: int, text: str = "", error: str | None = None) -> tuple[Any, ...]:
    return Answer(row, text or f"text {row}", "ok", "stop", 3, 4, 0.5, error).as_tuple()


def append(journal: Journal, number: int, answers: list[tuple[Any, ...]], epoch: int = 1) -> SegmentName:
    rows = [answer[0] for answer in answers]
    name = SegmentName(epoch, "0123abcd", number, min(rows), max(rows), len(rows), 0, 0)
    journal.append(name, JOB, answers)
    return name


@pytest.fixture(params=["local", "memory"])
def journal(request: pytest.FixtureRequest, tmp_path: Path) -> Journal:
    url = str(tmp_path / "j") if request.param == "local" else f"memory://journals/{tmp_path.name}"
    return Journal(Place.of(url))


def test_names_tell_the_counts() -> None:
    segment = SegmentName(12, "00ff00ff", 7, 5000, 9000, 512, 3, 99)
    assert SegmentName.parse(str(segment)) == segment
    assert SegmentName.parse("notes.txt") is None
    assert Answer.__slots__[0] == "row"
    assert len(segment_schema()) == len(Answer.__slots__)


def test_rows_come_back_in_order_whatever_the_order_of_writing(journal: Journal) -> None:
    rows = list(range(1000))
    random.Random(7).shuffle(rows)
    for number in range(10):
        append(journal, number, [answer(row) for row in rows[number * 100 : number * 100 + 100]])
    sweep = JournalRows(journal, JOB)

    taken = [sweep.take(start, start + 64) for start in range(0, 1000, 64)]
    assert [row for table in taken for row in table["row"].to_pylist()] == list(range(1000))
    assert taken[3]["completion"].to_pylist()[0] == f"text {3 * 64}"
    assert journal.count().rows == 1000


def test_a_later_epoch_replaces_rows_and_no_row_comes_twice(journal: Journal) -> None:
    append(journal, 0, [answer(0), answer(1, error="bad"), answer(2)])
    append(journal, 1, [answer(2), answer(3)])
    append(journal, 0, [answer(1, "better")], epoch=2)

    table = JournalRows(journal, JOB).take(0, 10)
    assert table["row"].to_pylist() == [0, 1, 2, 3]
    assert table["completion"].to_pylist()[1] == "better"


@pytest.mark.parametrize(
    "damage", ["cut", "flipped", "empty", "foreign", "other version", "not a segment", "longer", "other rows"]
)
def test_damaged_segments_are_set_aside(journal: Journal, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    append(journal, 0, [answer(0)])
    place = journal.segments.child(str(append(journal, 1, [answer(1)])))
    content = bytearray(place.read())
    if damage == "flipped":
        content[-200] ^= 1
    place.write(
        {
            "cut": bytes(content[: len(content) // 2]),
            "flipped": bytes(content),
            "empty": b"",
            "foreign": encode_segment("b" * 32, [answer(1)]),
            "other rows": encode_segment(JOB, [answer(2)]),
            "other version": bytes(content).replace(b"segment-1", b"segment-9"),
            "not a segment": b"[]\n",
            "longer": bytes(content) + b"\0",
        }[damage]
    )
    with pytest.raises(BatchError, match="is damaged"):
        JournalRows(journal, JOB).take(0, 10)
    names = journal.check(JOB)

    assert [name.number for name in names] == [0]
    assert JournalRows(journal, JOB, names).take(0, 10)["row"].to_pylist() == [0]
    assert sum(found.endswith(".damaged") for found in journal.segments.names()) == 1
    assert journal.check(JOB) == names  # it is noticed once


def test_every_cut_and_every_flipped_bit_is_noticed() -> None:
    content = encode_segment(JOB, [answer(row) for row in range(5)])
    head = content.index(b"\n")
    assert decode_segment(JOB, content).num_rows == 5
    for end in range(len(content)):
        with pytest.raises(SegmentError):
            decode_segment(JOB, content[:end])
    for position in range(head + 1, len(content)):
        flipped = bytearray(content)
        flipped[position] ^= 1 << position % 8
        with pytest.raises(SegmentError):
            decode_segment(JOB, bytes(flipped))


def test_a_broken_record_is_an_error_with_a_remedy(journal: Journal) -> None:
    assert journal.read_job() is None
    journal.write_job({"key": "x"})
    assert journal.read_job() == {"key": "x"}
    journal.place.child("job.json").write(b'{"key"')
    with pytest.raises(BatchError, match="Delete the journal"):
        journal.read_job()


def test_stopping_and_being_taken_over(journal: Journal) -> None:
    journal.write_attempt({"id": "one", "epoch": 1})
    assert not journal.is_stopped("one")
    journal.request_stop("cancelled")
    assert journal.is_stopped("one")
    journal.write_attempt({"id": "two", "epoch": 2})
    assert journal.is_stopped("one")
    assert not journal.is_stopped("two")


def test_the_writer_commits_without_being_closed(tmp_path: Path) -> None:
    journal = Journal(Place.of(tmp_path))
    with JournalWriter(journal, JOB, 1) as writer:
        writer.add([answer(0)])
        deadline = time.monotonic() + 10
        while journal.count().rows == 0 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert journal.count().rows == 1
        writer.add([answer(row) for row in range(1, 2000)])
    assert journal.count().rows == 2000
    assert JournalRows(journal, JOB).take(0, 3000)["row"].to_pylist() == list(range(2000))


def test_an_error_of_the_disk_reaches_the_caller(tmp_path: Path) -> None:
    (tmp_path / "segments").write_text("a file where the folder should be")
    writer = JournalWriter(Journal(Place.of(tmp_path)), JOB, 1)
    writer.add([answer(0)])
    with pytest.raises(OSError, match="segments"):
        writer.close()


WRITER = """
import sys
from prefect_huggingface.tasks.storage.journals.writers import JournalWriter
from prefect_huggingface.tasks.storage.journals.journal import Journal
from prefect_huggingface.tasks.storage.places import Place
writer = JournalWriter(Journal(Place.of(sys.argv[1])), "a" * 32, int(sys.argv[2]))
row = int(sys.argv[3])
print("writing", flush=True)
while True:
    writer.add([(row, "text %d" % row * 50, "ok", "stop", 3, 4, 0.5, None, None, False, None)])
    row += 1
"""


def test_killed_writers_leave_whole_segments_only(tmp_path: Path) -> None:
    journal, dice, first = Journal(Place.of(tmp_path)), random.Random(3), 0
    for epoch in range(1, 4):
        command = [sys.executable, "-c", WRITER, str(tmp_path), str(epoch), str(first)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONUNBUFFERED": "1"})
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(dice.uniform(0.1, 0.8))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        names = journal.check(JOB)
        first = max((name.last for name in names), default=-1) + 1
    rows = JournalRows(journal, JOB, names).take(0, first)["row"].to_pylist()

    assert rows == list(range(first))
    assert not any(found.endswith((".tmp", ".damaged")) for found in journal.segments.names())
