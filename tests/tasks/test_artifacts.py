"""Artifacts show values literally, whatever they hold, and do nothing outside a run."""

from __future__ import annotations

import json
import re
import warnings
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token

from prefect_huggingface.tasks.artifacts import (
    ProgressReport,
    escape_markdown,
    make_key,
    make_printable,
    make_table,
    markdown_table,
    publish_markdown,
    publish_table,
    shorten,
)


@pytest.mark.parametrize("text", ["Batch Summary!", "a__b//c", "ÄÖ", "", "-x-", "über 9"])
def test_keys_are_what_prefect_takes(text: str) -> None:
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", make_key(text))


@pytest.mark.parametrize(
    "value",
    ["a|b", "a\nb", "<script>alert(1)</script>", "[x](http://evil)", "![x](y)", "`code`", "# title", "*b* _i_", "&lt;"],
)
def test_values_cannot_become_markup(value: str) -> None:
    escaped = escape_markdown(value)
    assert "\n" not in escaped
    assert "<" not in escaped
    for character in "|[]*_`#!":
        assert not re.search(rf"(?<!\\)(\\\\)*{re.escape(character)}", escaped.replace("\\\\", ""))


def test_a_table_keeps_its_columns() -> None:
    lines = markdown_table(("a|b", "c"), [("1|2", "x\ny"), (None, 3)]).splitlines()
    assert len(lines) == 4
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {3}


def test_long_values_are_cut() -> None:
    assert shorten("x" * 1000) == "x" * 300 + "…"
    assert shorten(None) == ""


ODD_TEXTS = st.text(st.characters(), max_size=80) | st.text(
    "|\\\\`*_<>[]()!#&$~-+=:;\"' \n\t\x00\x1b\ud800\u202e\u2066a1", max_size=40
)
ODD_VALUES = st.none() | st.booleans() | st.integers() | st.floats() | ODD_TEXTS | st.lists(ODD_TEXTS, max_size=2)


def read_cells(markdown: str) -> list[list[Token]]:
    """The rows of the one table that a Markdown text must be, each cell as its inline token."""
    tokens = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(markdown)
    assert [tokens[0].type, tokens[-1].type] == ["table_open", "table_close"]
    rows: list[list[Token]] = []
    for token in tokens:
        if token.type == "tr_open":
            rows.append([])
        elif token.type == "inline":
            rows[-1].append(token)
    return rows


@settings(deadline=None)
@given(st.lists(st.lists(ODD_TEXTS, min_size=2, max_size=2), min_size=1, max_size=4))
@example([["a|b\\", "\\|"], ["https://evil.example/x", "www.evil.example"], ["<a href='x'>", "![x](y)"]])
@example([["", "0\r\u2066"]])
@example([["\ud83d", "\u202eabc"], ["--- | ---", "\x1b[31m"], ["**b**", "~~s~~ `c` $x$"], ["&lt; &amp;", "[^1]"]])
def test_a_table_shows_every_text_literally(rows: list[list[str]]) -> None:
    table = read_cells(markdown_table(("first", "second"), rows))
    assert [len(row) for row in table] == [2] * (len(rows) + 1)
    for row, texts in zip(table[1:], rows, strict=True):
        for cell, text in zip(row, texts, strict=True):
            assert {child.type for child in cell.children or ()} <= {"text", "text_special"}
            shown = "".join(child.content for child in cell.children or ())
            assert shown.replace("\u200b", "") == shorten(text).replace("\u200b", "")
            assert not re.search(r"https?://|www\.", shown, re.IGNORECASE)


@settings(deadline=None)
@given(st.text(st.characters()))
def test_what_is_printable_can_be_stored(text: str) -> None:
    shown = make_printable(text)
    shown.encode()
    assert not re.search("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", shown)


def test_letters_of_all_writings_stay() -> None:
    text = "Grüße, 世界! שלום عليكم नमस्ते 👩‍👩‍👧 e\u0301"
    assert shorten(text) == make_printable(text) == text


@settings(deadline=None)
@given(st.lists(st.dictionaries(ODD_TEXTS, ODD_VALUES, max_size=4), max_size=4))
def test_a_table_can_be_stored_and_read_by_a_browser(rows: list[dict[str, Any]]) -> None:
    table = make_table(rows)
    stored = json.dumps(table, allow_nan=False).encode()
    assert json.loads(stored) == table
    assert [len(row) for row in table] == [len({name for row in rows for name in row})] * len(rows)
    for row in table:
        for value in row.values():
            assert not isinstance(value, int) or abs(value) <= 2**53
            assert not isinstance(value, str) or len(value) <= 301


def test_a_table_is_bounded_and_long_names_stay_apart() -> None:
    long = "n" * 400
    (row, *rest) = make_table([{f"{long}{index}": 10**5000 for index in range(3)}] * 500)
    assert len(rest) == 99
    assert len(row) == 3
    assert set(row.values()) == {"(int)"}
    assert len(make_table([{str(index): index for index in range(1000)}])[0]) == 100


def test_outside_a_run_nothing_happens() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        publish_markdown("key", "# text")
        publish_table("key", [{"a": 1}])
        ProgressReport("key", "text").update(0.5, final=True)


ODD = "a|b\n<b>\x00\ud800\u202e`*[x](y) https://e.x " + "long " * 200


def test_odd_texts_reach_the_server(prefect_server: None) -> None:
    from prefect import flow
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId
    from prefect.context import FlowRunContext

    runs: list[Any] = []

    @flow
    def leave_artifacts() -> None:
        context = FlowRunContext.get()
        runs.append(context and context.flow_run and context.flow_run.id)
        publish_markdown("odd-markdown", f"# {escape_markdown(ODD)}\n\n{ODD}" + "x" * 600_000, ODD)
        publish_table("odd table!", [{ODD: ODD, "number": float("nan"), "big": 2**60, "end": float("inf")}], ODD)
        ProgressReport("odd-progress", ODD).update(0.5, ODD, final=True)

    leave_artifacts()
    with get_client(sync_client=True) as client:
        chosen = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=runs))
        found = {artifact.key: artifact for artifact in client.read_artifacts(artifact_filter=chosen)}
    assert set(found) == {"odd-markdown", "odd-table", "odd-progress"}
    assert str(found["odd-markdown"].data).endswith("(cut off)")
    (row,) = json.loads(str(found["odd-table"].data))
    assert row["big"] == str(2**60)
    assert row["end"] == "inf"
