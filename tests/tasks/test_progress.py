"""The bar and the closing table say what a person wants to know, on a terminal and without one."""

from __future__ import annotations

import io
import logging

import pytest
from rich.console import Console

from prefect_huggingface.tasks.batching.run import Progress
from prefect_huggingface.tasks.progress import ProgressBar, describe, format_seconds, print_summary
from prefect_huggingface.tasks.records import BatchSummary

HALF = Progress(1000, 500, 100, 3, 8000, 10.0, 40.0, 800.0)


def test_progress_in_words() -> None:
    assert HALF.share == 0.5
    assert describe(HALF) == "40.0 rows/s, 800 tokens/s, 12.5 s left, 3 failed, 100 from before"
    assert Progress(10, 0, 0, 0, 0, 0.0, 0.0, 0.0).seconds_left is None
    assert [format_seconds(seconds) for seconds in (4.25, 65, 3723)] == ["4.2 s", "1:05", "1:02:03"]


def test_the_bar_on_a_terminal() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=150)
    with ProgressBar("rows", 1000, console=console) as bar:
        bar.update(HALF)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "500/1000" in shown
    assert "12.5 s left" in shown


@pytest.mark.parametrize("show", [True, False])
def test_without_a_terminal_there_are_no_control_characters(show: bool, caplog: pytest.LogCaptureFixture) -> None:
    file = io.StringIO()
    with caplog.at_level(logging.INFO), ProgressBar("rows", 1000, show, Console(file=file)) as bar:
        bar.update(HALF)
    assert "\x1b" not in file.getvalue()


def test_the_closing_table_and_the_whole_path() -> None:
    path = "/a/very/long" * 20 + "/out.jsonl"
    summary = BatchSummary(1200, 1150, 50, path, 9000, 90.0, {"ok": 1100, "length": 50, "too_long": 50}, 20, 7)
    console = Console(file=io.StringIO(), width=60)
    print_summary(summary, {"Accuracy": "99.5 %"}, console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]

    for text in ("1,200", "1,150", "length 50, ok 1,100, too_long 50", "100.0", "1:30", "99.5 %", "Shared answers"):
        assert text in shown
    assert f"Output: {path}\n" in shown
