"""Artifacts show values literally, whatever they hold, and do nothing outside a run."""

from __future__ import annotations

import re
import warnings

import pytest

from prefect_huggingface.tasks.artifacts import (
    ProgressReport,
    escape_markdown,
    make_key,
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


def test_outside_a_run_nothing_happens() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        publish_markdown("key", "# text")
        publish_table("key", [{"a": 1}])
        ProgressReport("key", "text").update(0.5, final=True)
