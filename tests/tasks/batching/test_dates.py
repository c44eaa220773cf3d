"""Dates in the names of inputs and outputs: filled in from the schedule, refused where they are not known."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefect_huggingface.tasks.batching.dates import PLACEHOLDERS, fill_dates, find_start, find_unfinished
from prefect_huggingface.tasks.errors import BatchError
from prefect_huggingface.tasks.storage.journals.journal import Journal
from prefect_huggingface.tasks.storage.journals.ownership import hold_journal
from support.journals import claim_journal

START = datetime(2026, 3, 1, 0, 30, 5, tzinfo=UTC)


@pytest.mark.parametrize(
    ("location", "filled"),
    [
        ("answers.jsonl", "answers.jsonl"),
        ("answers-{date}.jsonl", "answers-2026-03-01.jsonl"),
        ("{yesterday}/in.csv", "2026-02-28/in.csv"),
        ("s3://b/year={year}/month={month}/day={day}/{time}.parquet", "s3://b/year=2026/month=03/day=01/00-30-05.parquet"),
        ("{week}-{hour}{minute}.jsonl", "2026-W09-0030.jsonl"),
        ("{{date}}-{date}.jsonl", "{date}-2026-03-01.jsonl"),
    ],
)  # fmt: skip
def test_filled_in(location: str, filled: str) -> None:
    assert fill_dates("destination", location, START) == filled


@pytest.mark.parametrize("location", ["a-{}.csv", "a-{now}.csv", "a-{date:%d}.csv", "{date!r}", "{date.year}", "{0}"])
def test_unknown_placeholders_are_refused(location: str) -> None:
    with pytest.raises(BatchError, match=r"`source` has the unknown placeholder .*Use \{date\}"):
        fill_dates("source", location, START)


@pytest.mark.parametrize("location", ["a{.csv", "a}.csv", "{date"])
def test_lone_braces_are_refused(location: str) -> None:
    with pytest.raises(BatchError, match="brace that stands alone.*double the braces"):
        fill_dates("source", location, START)


@settings(deadline=None)
@given(st.text(st.characters(exclude_characters="{}")))
def test_whatever_has_no_braces_stays(location: str) -> None:
    assert fill_dates("source", location, START) == location


@settings(deadline=None)
@given(st.datetimes(datetime(1970, 1, 2), datetime(9999, 12, 31)))
def test_what_is_filled_in_is_found_again(moment: datetime) -> None:
    import re

    for name, (_, pattern) in PLACEHOLDERS.items():
        assert re.fullmatch(pattern, fill_dates("source", f"{{{name}}}", moment.replace(tzinfo=UTC)))


def test_the_time_zone_decides_the_date() -> None:
    berlin, samoa = find_start("Europe/Berlin"), find_start("Pacific/Pago_Pago")
    assert abs(berlin - samoa).total_seconds() < 60
    assert berlin.utcoffset() != samoa.utcoffset()


@pytest.mark.parametrize("name", ["Europe/Atlantis", "", "../../etc/passwd", "/etc/passwd"])
def test_unknown_time_zones_are_refused(name: str) -> None:
    with pytest.raises(BatchError, match=f"`time_zone` must be a name such as 'UTC'.*got {name!r}"):
        find_start(name)


def begin(destination: Path) -> Journal:
    journal = Journal.beside(str(destination))
    claim_journal(journal).write("job", {"key": "k"})
    return journal


@pytest.mark.parametrize(
    "template", ["answers-{date}.jsonl", "{year}/{month}/{day}/answers.jsonl", "{date}/{date}.csv"]
)
def test_batches_that_were_left_are_found(tmp_path: Path, template: str) -> None:
    days = [datetime(2026, 2, day, tzinfo=UTC) for day in (20, 21, 22, 23)]
    done, left, running, today = (Path(fill_dates("d", f"{tmp_path}/{template}", day)) for day in days)
    for each in (done, left, running, today, tmp_path / "other.jsonl", tmp_path / "answers-x.jsonl"):
        begin(each)
    done.write_text("")
    # With failed rows the journal stays, and the output may have been moved away, or be on the Hub.
    moved = Path(fill_dates("d", f"{tmp_path}/{template}", datetime(2026, 2, 19, tzinfo=UTC)))
    begin(moved)
    claim_journal(Journal.beside(str(moved))).write("published", {"job": "k"})
    with hold_journal(Journal.beside(str(running))):
        assert find_unfinished(f"{tmp_path}/{template}", str(today)) == [str(left)]


def test_batches_that_were_left_are_found_in_a_remote_store() -> None:
    import fsspec

    begin_at = "memory://dates/answers-2026-02-21.jsonl"
    owner = claim_journal(Journal.beside(begin_at))
    owner.write("job", {"key": "k"})
    owner.beat(0, ended=True)
    try:
        assert find_unfinished("memory://dates/answers-{date}.jsonl", "memory://dates/answers-x.jsonl") == [begin_at]
    finally:
        fsspec.filesystem("memory").rm("/dates", recursive=True)
