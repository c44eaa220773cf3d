"""The torch engine says the same as Transformers, row by row, whatever else is in its batch."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path

import pytest

from prefect_huggingface.blocks import EngineOptions, GenerationOptions, LocalModel
from prefect_huggingface.tasks.engines.torch_engine import TorchTextEngine
from prefect_huggingface.tasks.errors import GenerationError
from prefect_huggingface.tasks.records import Completion, Request
from support.export_models import make_model as make_checkpoint
from support.tiny_models import SAMPLE_TEXTS, make_tokenizer

NEW_TOKENS = 24
WORDS = " ".join(SAMPLE_TEXTS).split()
CHOOSE = random.Random(7)
PROMPTS = [" ".join(CHOOSE.choices(WORDS, k=CHOOSE.randint(1, 25))) for _ in range(24)]


def make_model(folder: Path, **settings) -> LocalModel:
    options = settings.pop("options", GenerationOptions(max_new_tokens=NEW_TOKENS))
    return LocalModel(
        model_id=str(folder), backend="torch", device="cpu", chat_template="never", options=options, **settings
    )


def load(folder: Path, **settings) -> TorchTextEngine:
    return TorchTextEngine(folder, make_model(folder, **settings))


def run(engine: TorchTextEngine, prompts: list[str], in_flight: int | None = None, **options) -> list[Completion]:
    """Generate all at once and return the completions in the order of the prompts."""
    chosen = GenerationOptions(**options) if options else None
    requests = [Request(prompt=prompt, id=index, options=chosen) for index, prompt in enumerate(prompts)]
    return sorted(engine.generate(requests, in_flight), key=lambda completion: completion.request_id)


@pytest.fixture(scope="module")
def engine(tiny_llama: Path) -> Iterator[TorchTextEngine]:
    with load(tiny_llama) as loaded:
        yield loaded


class Reference:
    """Transformers by itself, one prompt at a time."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()

    def tokens(self, prompt: str, **settings) -> list[int]:
        inputs = self.tokenizer(prompt, return_tensors="pt")
        settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, **settings}
        return self.model.generate(**inputs, **settings)[0, inputs.input_ids.shape[1] :].tolist()

    def text(self, prompt: str, **settings) -> str:
        return self.tokenizer.decode(self.tokens(prompt, **settings), skip_special_tokens=True)


@pytest.fixture(scope="module")
def reference(tiny_llama: Path) -> Reference:
    return Reference(tiny_llama)


@pytest.fixture(scope="module")
def expected(reference: Reference) -> list[str]:
    return [reference.text(prompt) for prompt in PROMPTS]


@pytest.mark.parametrize("in_flight", [1, 3, 24])
def test_greedy_text_is_the_same_alone_and_in_any_batch(engine, expected, in_flight):
    order = list(range(len(PROMPTS)))
    random.Random(in_flight).shuffle(order)
    completions = run(engine, [PROMPTS[index] for index in order], in_flight)
    assert [completion.text for completion in completions] == [expected[index] for index in order]


def test_answers_of_different_lengths_join_and_leave_one_batch(engine, expected, reference):
    lengths = [1 + index % NEW_TOKENS for index in range(len(PROMPTS))]
    requests = [
        Request(prompt=prompt, id=index, options=GenerationOptions(max_new_tokens=length))
        for index, (prompt, length) in enumerate(zip(PROMPTS, lengths, strict=True))
    ]
    for completion in engine.generate(requests, in_flight=5):
        index = completion.request_id
        tokens = reference.tokens(PROMPTS[index])[: lengths[index]]
        assert completion.text == reference.tokenizer.decode(tokens, skip_special_tokens=True)
        assert completion.generated_tokens == len([token for token in tokens if token != 1])


def make_mamba(folder: Path) -> Path:
    """Save a model with a recurrent state, whose answers cannot join a running batch."""
    from transformers import MambaConfig, MambaForCausalLM

    folder.mkdir(parents=True)
    config = MambaConfig(
        vocab_size=make_tokenizer(folder), hidden_size=64, state_size=8, num_hidden_layers=2, bos_token_id=0,
        eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    MambaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["gpt2", "bloom", "phi3", "gemma3", "mistral", "mamba"])
def test_every_kind_of_model_says_what_transformers_says(session_folder, kind):
    folder = session_folder / "models" / f"torch-{kind}"
    changes = {"sliding_window": 8} if kind == "mistral" else {}
    folder = make_mamba(folder) if kind == "mamba" else make_checkpoint(folder, kind, **changes)
    alone = Reference(folder)
    expected = [alone.text(prompt) for prompt in PROMPTS[:8]]
    with load(folder) as engine:
        assert [completion.text for completion in run(engine, PROMPTS[:8])] == expected
        assert [completion.text for completion in run(engine, PROMPTS[:8], in_flight=1)] == expected


def test_counts_are_those_of_the_tokenizer(engine, reference):
    for completion, prompt in zip(run(engine, PROMPTS), PROMPTS, strict=True):
        assert completion.prompt_tokens == len(reference.tokenizer(prompt).input_ids) == engine.count_tokens(prompt)
        tokens = [token for token in reference.tokens(prompt) if token != reference.tokenizer.eos_token_id]
        assert completion.generated_tokens == len(tokens)
        assert completion.finish_reason == ("length" if len(tokens) == NEW_TOKENS else "stop")


def test_streamed_pieces_are_the_text_of_every_request(engine, expected):
    assert ["".join(engine.stream(Request(prompt=prompt))) for prompt in PROMPTS[:6]] == expected[:6]
    streams: list[list[str]] = [[] for _ in PROMPTS]
    futures = [
        engine.submit(Request(prompt=prompt), pieces.append) for prompt, pieces in zip(PROMPTS, streams, strict=True)
    ]
    texts = [future.result().text for future in futures]
    assert ["".join(pieces) for pieces in streams] == texts == expected


def test_stop_strings_end_the_generation_and_are_cut_off(engine, expected, reference):
    checked = 0
    for prompt, text in zip(PROMPTS[:12], expected[:12], strict=True):
        tokens = reference.tokens(prompt)
        for stop in {text[start : start + 4] for start in range(0, len(text) - 4, 5)}:
            if "\ufffd" in stop:
                continue
            completion = engine.submit(Request(prompt, options=GenerationOptions(stop=[stop]))).result()
            assert completion.text == text[: text.index(stop)]
            assert completion.finish_reason == "stop"
            # Not one token more than it takes.
            assert stop in reference.tokenizer.decode(tokens[: completion.generated_tokens])
            assert stop not in reference.tokenizer.decode(tokens[: completion.generated_tokens - 1])
            checked += 1
    assert checked > 20
    early = run(engine, PROMPTS[:1], stop=[expected[0][:2]])[0]
    assert early.text == ""
    assert early.generated_tokens < NEW_TOKENS / 2


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        ({"repetition_penalty": 1.7}, {"repetition_penalty": 1.7}),
        ({"no_repeat_ngram_size": 2}, {"no_repeat_ngram_size": 2}),
        ({"min_new_tokens": 15}, {"min_new_tokens": 15}),
        ({"num_beams": 4}, {"num_beams": 4}),
    ],
)
def test_options_do_what_they_do_in_transformers(engine, reference, options, settings):
    completions = run(engine, PROMPTS[:6], max_new_tokens=16, **options)
    expected = [reference.text(prompt, max_new_tokens=16, **settings) for prompt in PROMPTS[:6]]
    assert [completion.text for completion in completions] == expected


def test_beams_give_several_answers_best_first(engine, reference):
    completion = run(engine, PROMPTS[:1], max_new_tokens=12, num_beams=4, n=3)[0]
    inputs = reference.tokenizer(PROMPTS[0], return_tensors="pt")
    rows = reference.model.generate(**inputs, max_new_tokens=12, num_beams=4, num_return_sequences=3, do_sample=False)
    texts = reference.tokenizer.batch_decode(rows[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    assert (completion.text, *completion.alternatives) == tuple(texts)


def test_a_seed_repeats_an_answer_in_any_batch(engine):
    sampled = {"do_sample": True, "temperature": 1.5, "max_new_tokens": 16}
    alone = [run(engine, [prompt], seed=5, **sampled)[0].text for prompt in PROMPTS[:8]]
    mixed = [
        Request(prompt, id=index, options=GenerationOptions(seed=5 if index < 8 else index, **sampled))
        for index, prompt in enumerate(PROMPTS)
    ]
    random.Random(1).shuffle(mixed)
    together = {completion.request_id: completion.text for completion in engine.generate(mixed)}
    assert [together[index] for index in range(8)] == alone
    assert run(engine, PROMPTS[:1], seed=6, **sampled)[0].text != alone[0]
    assert len({run(engine, PROMPTS[:1], **sampled)[0].text for _ in range(4)}) > 1


def test_several_answers_differ_and_repeat(engine):
    options = {"do_sample": True, "seed": 3, "n": 5, "max_new_tokens": 12}
    first, second = run(engine, [PROMPTS[0]], **options)[0], run(engine, PROMPTS[:4], **options)[0]
    answers = (first.text, *first.alternatives)
    assert len(set(answers)) == 5
    assert answers == (second.text, *second.alternatives)
    assert first.generated_tokens > engine.count_tokens(first.text)


def test_logprobs_are_those_of_the_model(engine, reference):
    import torch

    completion = run(engine, PROMPTS[:5], logprobs=True)[3]
    ids = reference.tokenizer(PROMPTS[3]).input_ids
    tokens = [token for token in reference.tokens(PROMPTS[3]) if token != 1]
    with torch.inference_mode():
        logs = torch.log_softmax(reference.model(torch.tensor([ids + tokens])).logits[0], -1)
    expected = [logs[len(ids) - 1 + place, token].item() for place, token in enumerate(tokens)]
    assert completion.logprobs == pytest.approx(expected, abs=1e-4)


def test_echo_puts_the_prompt_first(engine, expected):
    completion = run(engine, PROMPTS[:1], echo=True)[0]
    assert completion.text == PROMPTS[0] + expected[0]
    request = Request(PROMPTS[0], options=GenerationOptions(echo=True))
    assert "".join(engine.stream(request)) == completion.text


def test_a_cancelled_request_leaves_the_others_alone(engine, expected):
    begun = threading.Event()
    endless = GenerationOptions(max_new_tokens=400, ignore_eos=True)
    victim = engine.submit(Request("The capital", options=endless), lambda _: begun.set())
    others = [engine.submit(Request(prompt)) for prompt in PROMPTS]
    assert begun.wait(20)
    assert victim.cancel()
    assert [future.result().text for future in others] == expected
    with pytest.raises(CancelledError):
        victim.result()


def test_a_deadline_cuts_one_answer_off(engine, expected):
    slow = GenerationOptions(max_new_tokens=400, ignore_eos=True, deadline_seconds=0.05)
    late = engine.submit(Request("The capital", options=slow))
    others = run(engine, PROMPTS[:6])
    completion = late.result()
    assert completion.finish_reason == completion.status == "deadline"
    assert completion.generated_tokens < 400
    assert completion.error is None
    assert [other.text for other in others] == expected[:6]


@pytest.mark.parametrize("rows", [200, pytest.param(1000, marks=pytest.mark.slow)])
def test_every_bad_row_has_its_own_error_and_every_good_row_is_right(engine, expected, rows):
    """Rows from 8 threads, and every eighth of them is bad or cancelled."""
    bad = {
        "empty_prompt": Request(""),
        "empty_prompt ": Request(" \n\t "),
        "too_long": Request("word " * 600),
        "invalid_prompt": Request(messages=[{"role": "nobody", "content": "x"}]),
        "invalid_prompt ": Request("x", images=["a.png"]),
        "invalid_option": Request("x", options=GenerationOptions(num_beams=2)),
    }
    with load(Path(engine._model.config._name_or_path), options=GenerationOptions(do_sample=True, seed=0)) as sampling:
        assert sampling.submit(bad["invalid_option"]).result().error_code == "invalid_option"
    del bad["invalid_option"]

    kinds = [*bad, "cancelled"]

    def work(thread: int) -> list[tuple[str | None, Completion]]:
        asked = []
        for index in range(rows // 8):
            kind = kinds[index * len(kinds) // (rows // 8)] if index % 8 == thread else None
            if kind == "cancelled":
                assert engine.submit(Request(PROMPTS[0])).cancel()
                continue
            request = bad[kind] if kind else Request(PROMPTS[index % len(PROMPTS)], id=index % len(PROMPTS))
            asked.append((kind, engine.submit(request)))
        return [(kind, future.result()) for kind, future in asked]

    with ThreadPoolExecutor(8) as pool:
        found = [row for answered in pool.map(work, range(8)) for row in answered]
    assert {kind for kind, _ in found} == {None, *bad}
    for kind, completion in found:
        if kind is None:
            assert completion.text == expected[completion.request_id]
        else:
            assert completion.error_code == kind.strip()
            assert completion.error
    assert run(engine, PROMPTS[:2])[1].text == expected[1]


@pytest.mark.parametrize("policy", ["truncate_left", "truncate_right", "skip"])
def test_too_long_prompts_are_cut_or_skipped(engine, reference, policy):
    ids = reference.tokenizer(" ".join(PROMPTS) * 2).input_ids
    prompt = reference.tokenizer.decode(ids)
    completion = run(engine, [prompt], context_overflow=policy, max_new_tokens=12)[0]
    if policy == "skip":
        assert (completion.finish_reason, completion.text, completion.status) == ("skipped", "", "skipped")
        return
    kept = ids[-500:] if policy == "truncate_left" else ids[:500]
    assert completion.prompt_tokens == 500
    assert completion.text == reference.text(reference.tokenizer.decode(kept), max_new_tokens=12)


def test_an_error_in_a_stream_comes_at_once(engine):
    started = time.process_time()
    with pytest.raises(GenerationError, match="text in it"):
        list(engine.stream(Request("  ")))
    assert time.process_time() - started < 1


def test_a_receiver_that_fails_ends_its_request_only(engine, expected):
    def fail(piece: str) -> None:
        raise RuntimeError("the window is closed")

    broken = engine.submit(Request(PROMPTS[0]), fail)
    assert run(engine, PROMPTS[:3])[0].text == expected[0]
    assert broken.result().error_code == "engine_error"
    assert "the window is closed" in broken.result().error


def test_memory_that_runs_out_only_makes_the_batch_smaller(tiny_llama, expected):
    """The forward pass refuses more than three rows, as a full GPU would."""
    import torch

    with load(tiny_llama) as engine:
        sizes = []

        def refuse(module, args, kwargs):
            sizes.append(len(kwargs["input_ids"]))
            if sizes[-1] > 3:
                raise torch.OutOfMemoryError("CUDA out of memory")

        hook = engine._model.register_forward_pre_hook(refuse, with_kwargs=True)
        assert [completion.text for completion in run(engine, PROMPTS)] == expected
        assert max(sizes) > 3
        hook.remove()

        def refuse_long(module, args, kwargs):
            if kwargs["input_ids"].shape[1] > 120:
                raise torch.OutOfMemoryError("CUDA out of memory")

        engine._model.register_forward_pre_hook(refuse_long, with_kwargs=True)
        completions = run(engine, [*PROMPTS[:3], "word " * 60])
        assert completions[3].error_code == "out_of_cache"
        long = [engine.count_tokens(prompt) > 120 for prompt in PROMPTS[:3]]
        assert [completion.error_code == "out_of_cache" for completion in completions[:3]] == long


def test_a_failure_of_the_model_is_reported_and_survived(tiny_llama, expected):
    with load(tiny_llama) as engine:

        def fail(module, args):
            raise RuntimeError("device-side assert")

        hook = engine._model.register_forward_pre_hook(fail)
        completions = run(engine, PROMPTS[:3])
        assert {completion.error_code for completion in completions} == {"engine_error"}
        assert "device-side assert" in completions[0].error
        hook.remove()
        assert run(engine, PROMPTS[:3])[2].text == expected[2]


def test_closing_ends_what_is_under_way(tiny_llama):
    engine = load(tiny_llama)
    endless = GenerationOptions(max_new_tokens=450, ignore_eos=True)
    futures = [engine.submit(Request("The capital", options=endless)) for _ in range(100)]
    engine.close()
    completions = [future.result(timeout=5) for future in futures]
    assert {completion.error_code for completion in completions} == {"cancelled"}
    assert engine.submit(Request("x")).result(timeout=5).error_code == "cancelled"
    engine.close()


def test_one_sequence_at_a_time_is_the_exact_mode(tiny_llama):
    """In bfloat16 the rows beside a row change its rounding; alone they cannot."""
    settings = {"dtype": "bfloat16", "engine": EngineOptions(max_num_seqs=1)}
    with load(tiny_llama, **settings) as engine:
        alone = [engine.submit(Request(prompt)).result().text for prompt in PROMPTS]
        assert [completion.text for completion in run(engine, PROMPTS)] == alone
