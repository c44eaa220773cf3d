"""The text of an answer is the same however its tokens come, and stop strings cut it at the same place."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefect_huggingface.blocks import GenerationOptions
from prefect_huggingface.tasks.engines.detokenizer import (
    REPLACEMENT,
    RustTokenizer,
    StopStrings,
    TransformersTokenizer,
    WindowDetokenizer,
    split_text,
    token_bytes,
)
from prefect_huggingface.tasks.engines.request_state import RequestState, Sequence
from prefect_huggingface.tasks.records import Request
from support.decoders import EXTRA_TEXTS, byte_level, sentence_piece
from support.tiny_models import SAMPLE_TEXTS

TOKENIZERS = {"byte-level": byte_level, "sentence-piece": sentence_piece}
TEXTS = st.one_of(
    st.sampled_from(SAMPLE_TEXTS + EXTRA_TEXTS), st.text(max_size=40), st.text(alphabet=" ab\n👍東é", max_size=40)
)
tokenizers = pytest.mark.parametrize("name", TOKENIZERS)


class WindowTokenizer(RustTokenizer):
    """Decodes as a tokenizer that is not in a `tokenizer.json`."""

    def open_stream(self) -> WindowDetokenizer:
        return WindowDetokenizer(self)


def cut(text: str, stop: list[str]) -> str:
    """Cut a whole text at the stop string that ends first; of two that end together the longer one counts."""
    places = [(text.find(item) + len(item), text.find(item)) for item in stop if item in text]
    return text[: min(places)[1]] if places else text


def read(tokenizer: RustTokenizer, token_ids: list[int], stop=(), streamed: bool = True) -> tuple[Sequence, list[str]]:
    """Give a sequence its tokens and return it with its pieces."""
    pieces: list[str] = []
    state = RequestState(Request("x"), pieces.append if streamed else None)
    state.begin(GenerationOptions(max_new_tokens=9999, stop=list(stop)), [1], tokenizer)
    [sequence] = state.sequences
    for token in token_ids:
        if not sequence.append(token):
            break
    sequence.finish("length")
    assert state.error is None
    return sequence, pieces


@st.composite
def text_with_stops(draw):
    text = draw(TEXTS)
    stops = []
    for _ in range(draw(st.integers(0, 3))):
        if text and draw(st.booleans()):
            start = draw(st.integers(0, len(text) - 1))
            stops.append(text[start : start + draw(st.integers(1, 12))])
        else:
            stops.append(draw(st.text(alphabet=" ab\n.é", min_size=1, max_size=3)))
    return text, stops


@tokenizers
@pytest.mark.parametrize("kind", [RustTokenizer, WindowTokenizer])
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_stop_strings_cut_the_text_streamed_or_not_like_the_whole_text(name, kind, data):
    tokenizer = kind(TOKENIZERS[name]())
    text, stop = data.draw(text_with_stops())
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    sequence, pieces = read(tokenizer, token_ids, stop)
    whole = tokenizer.decode(token_ids)
    assert sequence.text == "".join(pieces) == cut(whole, stop)
    assert (sequence.finish_reason == "stop") == any(item in whole for item in stop)
    assert all(pieces)
    assert read(tokenizer, token_ids, stop, streamed=False)[0].text == sequence.text


@given(token_ids=st.lists(st.integers(6, 419), max_size=120))
@settings(max_examples=200, deadline=None)
def test_text_of_any_bytes_is_that_of_the_tokenizer(token_ids):
    """Random models give invalid UTF-8 all the time; with byte-level BPE it is still the tokenizer's own text."""
    tokenizer = RustTokenizer(byte_level())
    sequence, pieces = read(tokenizer, token_ids)
    assert sequence.text == "".join(pieces) == tokenizer.decode(token_ids)


@tokenizers
@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_any_tokens_give_one_text_streamed_or_not(name, data):
    tokenizer = RustTokenizer(TOKENIZERS[name]())
    token_ids = data.draw(st.lists(st.integers(0, TOKENIZERS[name]().get_vocab_size() - 1), max_size=60))
    streamed, pieces = read(tokenizer, token_ids)
    silent, _ = read(tokenizer, token_ids, streamed=False)
    assert streamed.text == "".join(pieces) == silent.text


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_what_is_held_back_may_still_become_a_stop_string(data):
    text = data.draw(st.text(alphabet="aab", max_size=30))
    stop = data.draw(st.lists(st.text(alphabet="ab", min_size=1, max_size=6), min_size=1, max_size=4))
    finder, position, given_out = StopStrings(stop), 0, ""
    while position < len(text) and not finder.found:
        size = data.draw(st.integers(1, 5))
        given_out += finder.feed(text[position : position + size])
        position += size
        seen = text[:position]
        if not finder.found:
            held = max(k for item in stop for k in range(len(item)) if seen.endswith(item[:k]))
            assert given_out == seen[: len(seen) - held]
    assert given_out + finder.finish() == cut(text, stop)


def test_pieces_come_as_soon_as_they_are_certain():
    tokenizer = RustTokenizer(byte_level())
    pieces: list[str] = []
    state = RequestState(Request("x"), pieces.append)
    state.begin(GenerationOptions(stop=["\n\n"]), [1], tokenizer)
    shown = []
    for token in tokenizer.encode("a\nb 👍\n", add_special_tokens=False):
        state.sequences[0].append(token)
        shown.append("".join(pieces))
    assert shown[0] == "a"
    assert not any(REPLACEMENT in text for text in shown)
    # The last line break may still become the stop string.
    assert shown[-1] == "a\nb 👍"
    state.sequences[0].finish("length")
    assert state.sequences[0].text == "a\nb 👍\n"


@tokenizers
@pytest.mark.parametrize("kind", [RustTokenizer, WindowTokenizer])
@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_the_texts_of_tokens_are_the_text(name, kind, data):
    tokenizer = kind(TOKENIZERS[name]())
    size = TOKENIZERS[name]().get_vocab_size()
    given_text = st.builds(lambda text: tokenizer.encode(text, add_special_tokens=False), TEXTS)
    token_ids = data.draw(st.one_of(given_text, st.lists(st.integers(0, size - 1), max_size=40)))
    texts = split_text(tokenizer, token_ids)
    assert len(texts) == len(token_ids)
    assert b"".join(map(token_bytes, texts)).decode() == read(tokenizer, token_ids)[0].text


@tokenizers
def test_a_part_of_a_character_is_written_as_its_bytes(name):
    tokenizer = RustTokenizer(TOKENIZERS[name]())
    token_ids = tokenizer.encode("a\U0001f9ea", add_special_tokens=False)
    texts = split_text(tokenizer, token_ids)
    parts = {"byte-level": ["\\xf0\\x9f", "\\xa7", "\\xaa"], "sentence-piece": ["\\xf0", "\\x9f", "\\xa7", "\\xaa"]}
    assert [text for text in texts if text] == ["a", *parts[name]]
    assert b"".join(map(token_bytes, texts)) == "a\U0001f9ea".encode()


def test_special_tokens_have_no_text():
    tokenizer = RustTokenizer(sentence_piece())
    special = tokenizer.special_id("<|end|>")
    assert special is not None
    words = tokenizer.encode("the is", add_special_tokens=False)
    assert tokenizer.special_id("the") is None
    sequence, pieces = read(tokenizer, [special] * 50 + words[:1] + [special] * 500 + words[1:], ["never"])
    assert sequence.text == "".join(pieces) == "the is"


def test_an_error_of_the_receiver_is_that_of_the_request():
    def fail(_: str) -> None:
        raise RuntimeError("closed")

    tokenizer = RustTokenizer(byte_level())
    state = RequestState(Request("x"), fail)
    state.begin(GenerationOptions(), [1], tokenizer)
    for token in tokenizer.encode("some text", add_special_tokens=False):
        state.sequences[0].append(token)
    assert state.is_done
    state.complete()
    assert "closed" in state.future.result(0).error


def test_the_truncation_and_padding_of_a_tokenizer_are_its_users(tiny_llama):
    from transformers import AutoTokenizer

    text, plain = "One, two, three, four, five.", AutoTokenizer.from_pretrained(tiny_llama)
    expected = [plain(text, add_special_tokens=special)["input_ids"] for special in (False, True)]
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=50)
    ours = TransformersTokenizer(tokenizer)
    assert [ours.encode(text, add_special_tokens=special) for special in (False, True)] == expected
    assert len(tokenizer(text, truncation=True, max_length=4)["input_ids"]) == 4
    assert ours.encode(text, add_special_tokens=False) == expected[0]
