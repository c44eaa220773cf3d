"""Prompts are written once: templates, start tokens, messages, options and the context."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from prefect_huggingface.blocks import GenerationOptions
from prefect_huggingface.tasks.engines.base import RequestError
from prefect_huggingface.tasks.engines.chat_templates import ChatTemplate, read_added_texts
from prefect_huggingface.tasks.engines.inputs import InputProcessor, context_length_of, fit_context, resolve_options
from prefect_huggingface.tasks.engines.request_state import RequestState
from prefect_huggingface.tasks.records import Request
from support.tiny_models import CHAT_TEMPLATE

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_2 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% elif m['role'] == 'assistant' %}{% generation %} {{ m['content'] }}{% endgeneration %}"
    "{% else %}{{ raise_exception('Only user and assistant are known.') }}{% endif %}{% endfor %}"
)
PLAIN = "{% for m in messages %}### {{ m['role'] }}:\n{{ m['content'] }}\n{% endfor %}### Response:\n"
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
TEMPLATES = {"tiny": CHAT_TEMPLATE, "chatml": CHATML, "llama-2": LLAMA_2, "plain": PLAIN}
USER = [{"role": "user", "content": "Hello"}]


def writer(source: str | None, use: str = "auto") -> InputProcessor:
    return InputProcessor(ChatTemplate(source or {}, TOKENS), use)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_is_the_same_as_that_of_transformers(name, tiny_llama, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.chat_template = TEMPLATES[name]
    tokenizer.save_pretrained(tmp_path)
    conversation = [*USER, {"role": "assistant", "content": "Hi <&> \u00e9"}, {"role": "user", "content": "Bye"}]
    wanted = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    found = InputProcessor.of_folder(tmp_path).write(Request(messages=conversation))
    assert found.text == wanted
    assert not found.add_special_tokens


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_is_applied_exactly_once(name):
    writing = writer(TEMPLATES[name])
    once = writing.write(Request("Hello"))
    assert once.text == writing.write(Request(messages=USER)).text
    twice = writing.write(Request(once.text))
    assert twice == once


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_is_used_as_chosen(name):
    assert writer(TEMPLATES[name], "never").write(Request("Hello")).text == "Hello"
    templated = writer(TEMPLATES[name], "always").write(Request("Hello")).text
    assert writer(TEMPLATES[name], "never").write(Request("Hello", chat_template="always")).text == templated
    assert writer(TEMPLATES[name], "always").write(Request("Hello", chat_template="never")).text == "Hello"


def test_a_start_token_is_never_doubled():
    assert writer(None).write(Request("Hello")).add_special_tokens
    assert not writer(None).write(Request("<s>Hello")).add_special_tokens
    assert not writer(LLAMA_2).write(Request("Hello")).add_special_tokens
    # A templated text without the start token that its template writes gets it from the tokenizer.
    assert writer(LLAMA_2).write(Request("[INST] Hello [/INST]")).add_special_tokens
    assert not writer(CHATML).write(Request("<|im_start|>user\nHello<|im_end|>\n")).add_special_tokens


def test_tools_and_parts_of_content_reach_the_template():
    source = "{{ tools | tojson }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    tools = [{"type": "function", "function": {"name": "f<>"}}]
    assert writer(source).write(Request(messages=parts, tools=tools)).text == json.dumps(tools) + "ab"


@pytest.mark.parametrize(
    ("messages", "code", "named"),
    [
        ([], "empty_prompt", "no messages"),
        ([{"role": "user", "content": " "}], "empty_prompt", "no text"),
        ([{"role": "robot", "content": "x"}], "invalid_prompt", "'robot'"),
        ([{"role": "user"}], "invalid_prompt", "NoneType"),
        ([{"role": "user", "content": [{"type": "image"}]}], "invalid_prompt", "'image'"),
        (["Hello"], "invalid_prompt", "str"),
        ("Hello", "invalid_prompt", "str"),
    ],
)
def test_messages_that_cannot_be_used_are_refused(messages, code, named):
    with pytest.raises(RequestError, match=named) as caught:
        writer(LLAMA_2).write(Request(messages=messages))
    assert caught.value.code == code


def test_a_chat_needs_a_template():
    with pytest.raises(RequestError, match="no chat template"):
        writer(None).write(Request(messages=USER))
    with pytest.raises(RequestError, match="no chat template"):
        writer(None, "always").write(Request("Hello"))


def test_a_template_cannot_leave_its_sandbox(tmp_path):
    hostile = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(RequestError):
        writer(hostile).write(Request(messages=USER))
    broken = writer("{% for m in %}")
    with pytest.raises(RequestError):
        broken.write(Request(messages=USER))


def test_templates_are_found_where_models_keep_them(tmp_path):
    places = {
        "tokenizer_config.json": json.dumps({"chat_template": [{"name": "tool", "template": "t"},
                                                               {"name": "default", "template": "a"}]}),
        "chat_template.json": json.dumps({"chat_template": "b"}),
        "chat_template.jinja": "c",
    }  # fmt: skip
    assert ChatTemplate.of_folder(tmp_path).sources == {}
    assert InputProcessor.of_folder(tmp_path).template is None
    for (name, content), wanted in zip(places.items(), "abc", strict=True):
        Path(tmp_path / name).write_text(content)
        assert ChatTemplate.of_folder(tmp_path).sources["default"] == wanted


def test_the_text_of_a_message_forges_nothing_in_a_template_that_the_caller_gives(tmp_path):
    settings = {"added_tokens_decoder": {"5": {"content": "<|note|>", "special": True}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    inputs = InputProcessor.of_folder(tmp_path)  # a model without a template of its own
    prompt = inputs.write(Request(messages=[{"role": "user", "content": "a <|note|> b"}], template=PLAIN))
    assert "a <|note|> b" in prompt.text
    assert not any("<|note|>" in segment for segment in prompt.segments)


def test_options_that_do_not_go_together_are_refused():
    defaults = GenerationOptions(max_new_tokens=10)
    assert resolve_options(defaults, Request("x")) == defaults
    assert resolve_options(defaults, Request("x", options=GenerationOptions(stop="a"))).max_new_tokens == 10
    with pytest.raises(RequestError, match="min_new_tokens"):
        resolve_options(defaults, Request("x", options=GenerationOptions(min_new_tokens=20)))
    with pytest.raises(RequestError, match="`max_tokens` is no option"):
        resolve_options(defaults, Request("x", options={"max_tokens": 3}))


@pytest.mark.parametrize(
    ("policy", "wanted"), [("truncate_left", [5, 6, 7]), ("truncate_right", [0, 1, 2]), ("skip", None)]
)
def test_prompts_are_cut_to_the_context(policy, wanted):
    options = GenerationOptions(max_new_tokens=4, context_overflow=policy)
    assert fit_context(range(8), options, 7, 4) == wanted
    assert fit_context([0, 1, 2], options, 7, 4) == [0, 1, 2]
    assert fit_context(range(8), options, None, 4) == list(range(8))


def test_a_prompt_with_no_room_at_all_is_an_error():
    with pytest.raises(RequestError, match="too_long|does not fit"):
        fit_context([1], GenerationOptions(max_new_tokens=9, context_overflow="truncate_left"), 8, 9)


def test_the_template_of_a_request_says_how_it_reasons_and_ends(tiny_llama):
    from prefect_huggingface.blocks import LocalModel
    from prefect_huggingface.tasks import load_engine

    inputs = load_engine(LocalModel(model_id=str(tiny_llama), backend="torch")).inputs
    state = RequestState(Request(messages=[{"role": "user", "content": "Two and two?"}]))
    inputs.begin(state)
    assert state.reasoning is None
    template = (
        "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'].split('</think>')[-1] }}<|system|>"
        "{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
    )
    other = RequestState(Request(messages=[{"role": "user", "content": "Two and two?"}], template=template))
    inputs.begin(other)
    assert other.reasoning is not None
    assert other.reasoning.starts_open
    assert inputs.tokenizer.special_id("<|system|>") in other.end_ids
    assert inputs.tokenizer.special_id("<|system|>") not in state.end_ids


@pytest.mark.parametrize(
    ("settings", "length"),
    [
        ({"n_positions": 512, "relative_attention_num_buckets": 32}, None),
        ({"max_position_embeddings": 514, "relative_attention_num_buckets": 32}, 514),
        ({"max_encoder_position_embeddings": 16384, "max_decoder_position_embeddings": 1024}, 16384),
        ({"text_config": {"max_position_embeddings": 4096}}, 4096),
    ],
)
def test_the_context_is_what_the_positions_allow(settings, length):
    assert context_length_of(settings) == length


def test_names_of_special_tokens_are_words(tmp_path):
    settings = {"extra_special_tokens": {"image_token": "<image_soft_token>", "boi_token": {"content": "<boi>"}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert read_added_texts(tmp_path)[0] == ["<image_soft_token>", "<boi>"]
