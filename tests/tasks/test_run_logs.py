"""The log of a run has what the libraries below say, once and short, whatever else is configured."""

from __future__ import annotations

import logging
import re
import uuid

import pytest
from prefect import flow, task
from prefect.logging.handlers import APILogHandler

from prefect_huggingface.tasks.run_logs import library_logs
from prefect_huggingface.tasks.storage.exports.child import describe_bar
from support.export_requests import LoggedExport
from support.flow_logs import messages_of

pytestmark = pytest.mark.usefixtures("prefect_server")


def speak() -> str:
    mark = uuid.uuid4().hex
    with library_logs():
        logging.getLogger("transformers.models").warning("from a task %s", mark)
        logging.getLogger("transformers.models").info("of no interest %s", mark)
    logging.getLogger("transformers.models").warning("too late %s", mark)
    return mark


@pytest.mark.parametrize("configured", [False, True])
def test_a_line_of_a_library_is_in_the_log_once(configured):
    other = APILogHandler()
    library = logging.getLogger("transformers")
    run = {}

    @flow
    def speaking() -> str:
        from prefect.context import FlowRunContext

        run["id"] = FlowRunContext.get().flow_run.id
        return task(speak)()

    if configured:  # as PREFECT_LOGGING_EXTRA_LOGGERS does
        library.addHandler(other)
    try:
        mark = speaking()
    finally:
        library.removeHandler(other)
    found = [line for line in messages_of(run["id"]) if mark in line]
    assert found == [f"from a task {mark}"] + [f"too late {mark}"] * configured


def test_a_line_outside_a_run_is_no_error(recwarn):
    speak()
    assert not [each for each in recwarn if "flow run id" in str(each.message)]


# What Prefect itself says of every run.
OF_PREFECT = ("Beginning flow run", "Created task run", "Finished in state", "View at ")


def test_the_log_of_an_export_is_at_most_six_lines_and_all_ours(logged_export: LoggedExport) -> None:
    lines = [line for line in logged_export.messages if not line.startswith(OF_PREFECT)]
    assert len(lines) <= 6, lines
    source, folder = (re.escape(str(place)) for place in (logged_export.model.model_id, logged_export.export.path))
    ours = (
        rf"Exporting {source} to OpenVINO in int4\.( .+)?",
        r"Step 1 of 3: converting the model to OpenVINO\.",
        r"Step 2 of 3: quantizing the weights\.",
        r"Step 3 of 3: loading the export and generating from it\.",
        rf"Exported {source} in [\d.]+ s: [\d.]+ MB in {folder}",
    )
    assert [bool(re.fullmatch(pattern, line)) for pattern, line in zip(ours, lines, strict=True)] == [True] * 5, lines


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("Loading weights:   3%|▎         | 1/29 [00:00<?, ?it/s]", "Loading weights: 3 %"),
        ("Applying Weight Compression ━━━━━━━━╸   64% • 0:00:01 • 0:00:00", "Applying Weight Compression: 64 %"),
        (" 45%|####5     | 5/10", "Progress: 45 %"),
        ("| int8_asym | 36% (1 / 10) | 20% (1 / 9) |", None),
        ("The model is 50% smaller.", None),
    ],
)
def test_a_bar_becomes_a_few_words(line, text):
    assert describe_bar(line) == text
