"""The text of an answer is the same however its tokens come, and stop strings cut it at the same place."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefect_huggingface.tasks.engines.stopping import REPLACEMENT, StopFinder, TextStream
from support.decoders import EXTRA_TEXTS, byte_level, decode_with, sentence_piece
from support.tiny_models import SAMPLE_TEXTS

TOKENIZERS = {"byte-level": byte_level, "sentence-piece": sentence_piece}
TEXTS = st.one_of(
    st.sampled_from(SAMPLE_TEXTS + EXTRA_TEXTS), st.text(max_size=40), st.text(alphabet=" ab\n👍東é", max_size=40)
)
tokenizers = pytest.mark.parametrize("name", TOKENIZERS)


def cut(text: str, stop: list[str]) -> str:
    """Cut a whole text at the stop string that ends first; of two that end together the longer one counts."""
    places = [(text.find(item) + len(item), text.find(item)) for item in stop if item in text]
    return text[: min(places)[1]] if places else text


def read(tokenizer, token_ids, stop=(), sizes=(1,)):
    """Push the tokens in chunks of the given sizes, over and over, and return the stream and its pieces."""
    pieces: list[str] = []
    stream = TextStream(decode_with(tokenizer), stop, pieces.append)
    position = turn = 0
    while position < len(token_ids):
        size = sizes[turn % len(sizes)]
        if stream.push(token_ids[position : position + size]):
            break
        position, turn = position + size, turn + 1
    stream.finish()
    return stream, pieces


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
@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_stop_strings_cut_the_text_of_every_chunking_like_the_whole_text(name, data):
    tokenizer = TOKENIZERS[name]()
    text, stop = data.draw(text_with_stops())
    token_ids = tokenizer.encode(text, add_special_tokens=False).ids
    sizes = data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=4))
    stream, pieces = read(tokenizer, token_ids, stop, sizes)
    whole = decode_with(tokenizer)(token_ids)
    assert stream.text == "".join(pieces) == cut(whole, stop)
    assert stream.stopped == any(item in whole for item in stop)
    assert all(pieces)


@tokenizers
@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_any_tokens_give_one_text_streamed_or_not(name, data):
    tokenizer = TOKENIZERS[name]()
    token_ids = data.draw(st.lists(st.integers(0, tokenizer.get_vocab_size() - 1), max_size=60))
    stop = data.draw(st.lists(st.sampled_from(["a", "th", REPLACEMENT, " ", "\n"]), max_size=2))
    one_by_one, pieces = read(tokenizer, token_ids, stop)
    in_chunks, _ = read(tokenizer, token_ids, stop, data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    silent = TextStream(decode_with(tokenizer), stop)
    silent.push(token_ids)
    assert one_by_one.text == "".join(pieces) == in_chunks.text == silent.finish()
    assert one_by_one.token_count_at_stop == in_chunks.token_count_at_stop == silent.token_count_at_stop


@given(token_ids=st.lists(st.integers(6, 419), max_size=120))
@settings(max_examples=200, deadline=None)
def test_text_of_any_bytes_is_that_of_the_tokenizer(token_ids):
    """Random models give invalid UTF-8 all the time; with byte-level BPE it is still the tokenizer's own text."""
    stream, _ = read(byte_level(), token_ids)
    assert stream.text == decode_with(byte_level())(token_ids)


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_finder_agrees_with_a_search_of_the_whole_text(data):
    text = data.draw(st.text(alphabet="aab", max_size=30))
    stop = data.draw(st.lists(st.text(alphabet="ab", min_size=1, max_size=6), min_size=1, max_size=4))
    finder, position, found = StopFinder(stop), 0, None
    while position < len(text) and found is None:
        size = data.draw(st.integers(1, 5))
        found = finder.feed(text[position : position + size])
        if found is None:
            position += size
            seen = text[:position]
            held = max(k for item in stop for k in range(len(item)) if seen.endswith(item[:k]))
            assert finder.partial_length == held
    assert (text if found is None else text[: position + found[0] - found[1]]) == cut(text, stop)


@tokenizers
def test_tokens_count_up_to_the_one_that_completes_the_stop_string(name):
    tokenizer = TOKENIZERS[name]()
    token_ids = tokenizer.encode("the is the an is the an", add_special_tokens=False).ids
    decode = decode_with(tokenizer)
    needed = next(n for n in range(len(token_ids)) if "an" in decode(token_ids[:n]))
    for sizes in ((1,), (3,), (len(token_ids),)):
        stream, _ = read(tokenizer, token_ids, ["an"], sizes)
        assert stream.token_count_at_stop == needed
        assert stream.push(token_ids)
        assert stream.text == "the is the "


def test_pieces_come_as_soon_as_they_are_certain():
    tokenizer = byte_level()
    pieces: list[str] = []
    stream = TextStream(decode_with(tokenizer), ["\n\n"], pieces.append)
    shown = []
    for token in tokenizer.encode("a\nb 👍\n", add_special_tokens=False).ids:
        stream.push([token])
        shown.append("".join(pieces))
    assert shown[0] == "a"
    assert not any(REPLACEMENT in text for text in shown)
    # The last line break may still become the stop string.
    assert shown[-1] == "a\nb 👍"
    assert stream.finish() == "a\nb 👍\n"


def test_special_tokens_have_no_text_and_no_cost():
    tokenizer = sentence_piece()
    calls = []

    def decode(token_ids):
        calls.append(len(token_ids))
        return decode_with(tokenizer)(token_ids)

    special = tokenizer.token_to_id("<|end|>")
    words = tokenizer.encode("the is", add_special_tokens=False).ids
    stream = TextStream(decode, ["never"])
    stream.push([special] * 50 + words[:1] + [special] * 500 + words[1:])
    assert stream.finish() == "the is"
    assert max(calls) < 10


@pytest.mark.parametrize("tail", ["valid", "invalid"])
def test_work_per_token_does_not_grow_with_the_text(tail):
    """Neither for a long text nor for a long run of invalid bytes."""
    tokenizer = byte_level()
    decoded = 0

    def decode(token_ids):
        nonlocal decoded
        decoded += len(token_ids)
        return decode_with(tokenizer)(token_ids)

    invalid = [tokenizer.token_to_id(pre) for pre in ("Ā", "¢", "å")]
    token_ids = tokenizer.encode(SAMPLE_TEXTS[0] * 60, add_special_tokens=False).ids
    if tail == "invalid":
        token_ids = [token for token in invalid if token is not None and token > 5][1:] * 1000
    stream = TextStream(decode, ["never"])
    stream.push(token_ids)
    assert stream.finish() == decode_with(tokenizer)(token_ids)
    assert decoded < 120 * len(token_ids)


def test_error_of_the_receiver_comes_out():
    def fail(_: str) -> None:
        raise RuntimeError("closed")

    stream = TextStream(decode_with(byte_level()), [], fail)
    with pytest.raises(RuntimeError, match="closed"):
        stream.push(byte_level().encode("some text", add_special_tokens=False).ids)
