"""Reasoning is kept apart from the answer, whatever the family and however the text is cut into pieces."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefect_huggingface.tasks.engines.reasoning import (
    FORMATS,
    ReasoningFormat,
    ReasoningSplitter,
    find_reasoning_format,
)

THINK = ReasoningFormat("<think>", "</think>")
OPEN = ReasoningFormat("<think>", "</think>", starts_open=True)
HARMONY = next(known for known in FORMATS if known.end == "<|end|>")
ONE_OF_HARMONY = (
    "<|channel|>analysis<|message|>Four, I think.<|end|><|start|>assistant<|channel|>final<|message|>It is 4."
)


def split_reasoning(text: str, known: ReasoningFormat) -> tuple[str, str]:
    splitter = ReasoningSplitter(known)
    (thought, answer), (last_thought, last_answer) = splitter.feed(text), splitter.finish()
    return thought + last_thought, answer + last_answer


@pytest.mark.parametrize(
    ("known", "text", "reasoning", "answer"),
    [
        (THINK, "<think>\nTwo and two.\n</think>\n\nFour.", "Two and two.", "Four."),
        (THINK, "<think>\n\n</think>\n\nFour.", "", "Four."),
        (THINK, "Four.", "", "Four."),
        (THINK, "  Four.", "", "  Four."),
        (THINK, "A <think> within </think> the text.", "", "A <think> within </think> the text."),
        (THINK, "<think>cut off at the lim", "cut off at the lim", ""),
        (THINK, "<think>cut off in the tag</thi", "cut off in the tag</thi", ""),
        (THINK, "<think>first</think><think>second</think>Four.", "firstsecond", "Four."),
        (THINK, "<thi", "", "<thi"),
        (THINK, "", "", ""),
        (OPEN, "Two and two.\n</think>\n\nFour.", "Two and two.", "Four."),
        (OPEN, "\n</think>\n\nFour.", "", "Four."),
        (OPEN, "<think>\nIt says the tag again.</think>Four.", "It says the tag again.", "Four."),
        (OPEN, "never ends \n", "never ends", ""),
        (ReasoningFormat("[THINK]", "[/THINK]"), "[THINK]Two.[/THINK]Four.", "Two.", "Four."),
        (HARMONY, ONE_OF_HARMONY, "Four, I think.", "It is 4."),
        (HARMONY, "<|channel|>final<|message|>It is 4.", "", "It is 4."),
        (
            HARMONY,
            "<|channel|>analysis<|message|>Ask.<|end|><|start|>assistant"
            "<|channel|>commentary to=functions.f<|message|>{}",
            "Ask.",
            "<|channel|>commentary to=functions.f<|message|>{}",
        ),
    ],
)
def test_whole_text(known: ReasoningFormat, text: str, reasoning: str, answer: str) -> None:
    assert split_reasoning(text, known) == (reasoning, answer)


@given(data=st.data())
def test_pieces_make_the_same_as_the_whole(data: st.DataObject) -> None:
    known = data.draw(st.sampled_from([THINK, OPEN, HARMONY]))
    parts = [*known.visible_marks, "a", " ", "\n", "<", "</", "|", "think"]
    text = "".join(data.draw(st.lists(st.sampled_from(parts), max_size=12)))
    splitter = ReasoningSplitter(known)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pairs = [splitter.feed(text[a:b]) for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    pairs.append(splitter.finish())
    assert ("".join(pair[0] for pair in pairs), "".join(pair[1] for pair in pairs)) == split_reasoning(text, known)


def test_a_stream_gives_thoughts_as_they_come() -> None:
    splitter = ReasoningSplitter(THINK)
    pieces = [splitter.feed(text) for text in ("<th", "ink>Two", " and", " two", "</", "think", ">\n", "\nFo", "ur")]
    assert pieces == [("", ""), ("Two", ""), (" and", ""), (" two", ""), *[("", "")] * 3, ("", "Fo"), ("", "ur")]


@pytest.mark.parametrize(
    ("template", "start"),
    [
        ("{% if '</think>' in content %}{% endif %}<|im_start|>", "<think>"),
        ("{{ '[THINK]' + m.thinking + '[/THINK]' }}", "[THINK]"),
        ("{{ '<|start|>assistant<|channel|>analysis<|message|>' }}", "<|channel|>analysis<|message|>"),
        ("<|START_THINKING|>{{ x }}<|END_THINKING|>", "<|START_THINKING|>"),
    ],
)
def test_the_template_shows_the_format(template: str, start: str) -> None:
    found = find_reasoning_format([template])
    assert found is not None
    assert (found.start, found.starts_open) == (start, False)


def test_a_template_without_tags_has_no_reasoning() -> None:
    assert find_reasoning_format(["<|user|>{{ m.content }}<|end|><|assistant|>"]) is None
    assert find_reasoning_format([]) is None


@pytest.mark.parametrize(
    ("prompt", "starts_open"),
    [
        ("<|im_start|>assistant\n<think>\n", True),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", False),
        ("Say <think> twice<|im_end|>\n<|im_start|>assistant\n", False),
    ],
)
def test_the_prompt_shows_whether_thinking_has_begun(prompt: str, starts_open: bool) -> None:
    found = find_reasoning_format(["... </think> ..."], prompt)
    assert found is not None
    assert found.starts_open is starts_open


def test_the_format_can_be_overridden() -> None:
    assert find_reasoning_format(["</think>"], tags=[]) is None
    assert find_reasoning_format([], "so: <a>", ["<a>", "</a>"]) == ReasoningFormat("<a>", "</a>", True)
