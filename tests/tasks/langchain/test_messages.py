"""LangChain's messages in the form of chat templates."""

from __future__ import annotations

from typing import Any

import pytest
from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)

from prefect_huggingface.tasks.errors import SettingsError
from prefect_huggingface.tasks.langchain.messages import read_messages


def test_roles_and_texts() -> None:
    messages = read_messages(
        [
            SystemMessage("Be short."),
            HumanMessage([{"type": "text", "text": "What is "}, "this?"]),
            AIMessage("A question."),
            ChatMessage(role="user", content="Right."),
        ]
    )
    assert messages == [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "What is this?"},
        {"role": "assistant", "content": "A question."},
        {"role": "user", "content": "Right."},
    ]


def test_tool_calls_and_their_results() -> None:
    call = {"name": "add", "args": {"a": 1, "b": 2}, "id": "call_1"}
    messages = read_messages([AIMessage("", tool_calls=[call]), ToolMessage("3", tool_call_id="call_1", name="add")])
    function = {"name": "add", "arguments": {"a": 1, "b": 2}}
    assert messages == [
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "id": "call_1", "function": function}],
        },
        {"role": "tool", "content": "3", "tool_call_id": "call_1", "name": "add"},
    ]


def test_messages_of_other_models_and_broken_calls() -> None:
    blocks = [
        {"type": "reasoning", "reasoning": "Hm."},
        {"type": "text", "text": "Let me see."},
        {"type": "tool_call", "id": "call_1", "name": "add", "args": {}},
    ]
    broken = {"type": "invalid_tool_call", "id": None, "name": None, "args": '{"name": "add", ', "error": "Cut off."}
    messages = read_messages(
        [
            ChatMessage(role="developer", content="Be short."),
            HumanMessage("1 + 2?", name="ann"),
            AIMessage(blocks),  # type: ignore[arg-type]
            AIMessage("Well.", invalid_tool_calls=[broken]),  # type: ignore[list-item]
            HumanMessage([{"type": "text", "text": "Once more."}]),
        ]
    )
    assert [(message["role"], message["content"]) for message in messages] == [
        ("developer", "Be short."),
        ("user", "1 + 2?"),
        ("assistant", "Let me see."),
        ("assistant", 'Well.\n{"name": "add", '),
        ("user", "Once more."),
    ]


@pytest.mark.parametrize(
    ("block", "place"),
    [
        ({"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}, "https://example.org/a.png"),
        ({"type": "image_url", "image_url": "/tmp/a.png"}, "/tmp/a.png"),
        ({"type": "image", "url": "/tmp/a.png"}, "/tmp/a.png"),
        ({"type": "image", "base64": "QUJD", "mime_type": "image/jpeg"}, "data:image/jpeg;base64,QUJD"),
    ],
)
def test_images_stand_where_they_are_in_the_text(block: dict[str, Any], place: str) -> None:
    messages = read_messages([HumanMessage([block, {"type": "text", "text": "What is this?"}])])
    parts = [{"type": "image_url", "image_url": {"url": place}}, {"type": "text", "text": "What is this?"}]
    assert messages == [{"role": "user", "content": parts}]


@pytest.mark.parametrize(
    ("messages", "wrong"),
    [
        ([], r"\[\]"),
        ([ChatMessage(role="robot", content="hi")], "'robot'"),
        ([FunctionMessage(name="add", content="3")], "'function'"),
        ([HumanMessage([{"type": "video", "url": "a.mp4"}])], "'video'"),
        ([HumanMessage([{"type": "image"}])], "`url` or `base64`"),
    ],
)
def test_what_no_template_knows_is_refused(messages: list[BaseMessage], wrong: str) -> None:
    with pytest.raises(SettingsError, match=wrong):
        read_messages(messages)
