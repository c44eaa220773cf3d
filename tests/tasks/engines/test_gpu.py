"""The torch engines on a CUDA GPU: placement, batches, precision and memory. Runs with `-m gpu` on such a machine.

The figures that the README notes are printed by `test_batches_on_the_gpu_are_many_times_faster`, with `-s`.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from prefect_huggingface.blocks import EngineOptions, GenerationOptions, LocalModel
from prefect_huggingface.tasks.engines.torch_batch import DenseBatch
from prefect_huggingface.tasks.engines.torch_engine import TorchSeq2SeqEngine, TorchTextEngine
from prefect_huggingface.tasks.engines.torch_graphs import GraphBatch
from prefect_huggingface.tasks.errors import EngineError
from prefect_huggingface.tasks.records import Completion, Request
from support.export_models import make_model
from support.tiny_models import SAMPLE_TEXTS, make_tiny_llama

pytestmark = pytest.mark.gpu

NEW_TOKENS = 24
PROMPTS = [text[start : start + 40 + 3 * start] for text in SAMPLE_TEXTS for start in range(8)]


def block(folder: Path, **settings) -> LocalModel:
    options = settings.pop("options", GenerationOptions(max_new_tokens=NEW_TOKENS))
    return LocalModel(model_id=str(folder), backend="torch", chat_template="never", options=options, **settings)


def run(engine: TorchTextEngine, prompts: list[str], in_flight: int | None = None, **options) -> list[Completion]:
    chosen = GenerationOptions(**options) if options else None
    requests = [Request(prompt, id=index, options=chosen) for index, prompt in enumerate(prompts)]
    return sorted(engine.generate(requests, in_flight), key=lambda completion: completion.request_id)


def texts(folder: Path, prompts: list[str] = PROMPTS, **settings) -> list[str]:
    with TorchTextEngine(folder, block(folder, **settings)) as engine:
        return [completion.text for completion in run(engine, prompts)]


@pytest.fixture(scope="module")
def expected(tiny_llama: Path) -> list[str]:
    """Texts of the CPU in full precision."""
    return texts(tiny_llama, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def engine(tiny_llama: Path) -> Iterator[TorchTextEngine]:
    with TorchTextEngine(tiny_llama, block(tiny_llama, device="0", dtype="float32")) as loaded:
        yield loaded


@pytest.mark.parametrize(
    "settings",
    [
        {}, {"device": "0"}, {"device": 0}, {"device": "cuda"}, {"device": "cuda:0"}, {"device": "GPU"},
        {"device_map": "auto"}, {"device_map": "cuda:0"},
    ],
)  # fmt: skip
def test_every_way_to_name_the_gpu_leads_there(tiny_llama, expected, settings):
    with TorchTextEngine(tiny_llama, block(tiny_llama, dtype="float32", **settings)) as engine:
        assert engine._model.device.type == "cuda"
        assert [completion.text for completion in run(engine, PROMPTS)] == expected


def test_the_cpu_can_still_be_chosen(tiny_llama, expected):
    with TorchTextEngine(tiny_llama, block(tiny_llama, device=-1, dtype="float32")) as engine:
        assert engine._model.device.type == "cpu"
        assert run(engine, PROMPTS[:1])[0].text == expected[0]


def test_a_gpu_that_is_not_there_is_refused_with_those_that_are(tiny_llama):
    with pytest.raises(EngineError, match="cuda:0"):
        TorchTextEngine(tiny_llama, block(tiny_llama, device="63"))


def test_a_model_over_cpu_and_gpu(tiny_llama, expected):
    layers = {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": "cpu", "model.norm": "cpu"}
    device_map = {**layers, "model.rotary_emb": 0, "lm_head": "cpu"}
    assert texts(tiny_llama, dtype="float32", device_map=device_map) == expected


@pytest.mark.parametrize("in_flight", [1, 5, 64])
def test_greedy_text_is_the_same_alone_and_in_any_batch(engine, expected, in_flight):
    assert [completion.text for completion in run(engine, PROMPTS, in_flight)] == expected
    assert ["".join(engine.stream(Request(prompt))) for prompt in PROMPTS[:4]] == expected[:4]


@pytest.mark.parametrize(
    ("name", "changes"),
    [("llama", {}), ("qwen3", {}), ("gpt2", {}), ("gemma3", {}), ("gemma2", {}), ("mistral", {"sliding_window": 8})],
)
def test_steps_that_are_replayed_say_what_the_cpu_says(tmp_path, name, changes):
    folder = make_model(tmp_path / name, name, **changes)
    expected = texts(folder, device="cpu", dtype="float32")
    with TorchTextEngine(folder, block(folder, device="0", dtype="float32")) as engine:
        assert isinstance(engine._batch, GraphBatch)
        for in_flight in (64, 1, 5):
            assert [completion.text for completion in run(engine, PROMPTS, in_flight)] == expected
        assert len(engine._batch._graphs) > 2


def test_a_model_whose_step_cannot_be_recorded_runs_without_graphs(tmp_path, tiny_llama, expected):
    import torch

    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    folder = make_model(tmp_path / "llama", "llama", rope_parameters=rope)
    with TorchTextEngine(folder, block(folder, device="0", dtype="float32")) as engine:
        assert type(engine._batch) is DenseBatch
        found = [completion.text for completion in run(engine, PROMPTS)]
    assert found == texts(folder, device="cpu", dtype="float32")
    assert float(torch.rand(4, device="cuda").sum()) > 0  # a recording that failed left them unusable
    assert texts(tiny_llama, device="0", dtype="float32") == expected


def test_stop_strings_and_seeds_mean_what_they_mean_on_the_cpu(engine, expected, tiny_llama):
    for prompt, text in zip(PROMPTS[:6], expected[:6], strict=True):
        if stop := text[3:6]:
            assert run(engine, [prompt], stop=[stop])[0].text == text[: text.index(stop)]
    sampled = {"do_sample": True, "seed": 4, "max_new_tokens": 16, "top_p": 0.9}
    on_gpu = [completion.text for completion in run(engine, PROMPTS, **sampled)]
    with TorchTextEngine(tiny_llama, block(tiny_llama, device="cpu", dtype="float32")) as on_cpu:
        assert [completion.text for completion in run(on_cpu, PROMPTS, **sampled)] == on_gpu


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_one_sequence_at_a_time_is_exact_in_low_precision(tiny_llama, dtype):
    settings = {"device": "0", "dtype": dtype, "engine": EngineOptions(max_num_seqs=1)}
    with TorchTextEngine(tiny_llama, block(tiny_llama, **settings)) as engine:
        alone = [engine.submit(Request(prompt)).result().text for prompt in PROMPTS]
        assert [completion.text for completion in run(engine, PROMPTS)] == alone


@pytest.mark.parametrize("load_in", ["8bit", "4bit"])
def test_quantized_weights_run(tiny_llama, load_in):
    pytest.importorskip("bitsandbytes")
    with TorchTextEngine(tiny_llama, block(tiny_llama, device="0", load_in=load_in)) as engine:
        assert all(completion.error is None for completion in run(engine, PROMPTS))


def test_memory_that_really_runs_out_only_makes_the_batch_smaller(tmp_path):
    """The process may take little more than the weights, so that a full batch does not fit."""
    import torch

    folder = make_tiny_llama(tmp_path, hidden_size=1024, layers=8, context_length=4096)
    prompts = [f"{index} " + SAMPLE_TEXTS[0] * 8 for index in range(64)]
    options = GenerationOptions(max_new_tokens=32, ignore_eos=True)
    # More room is promised than there is.
    settings = {"dtype": "float32", "engine": EngineOptions(max_num_seqs=64, cache_size_gb=60), "options": options}
    expected = texts(folder, prompts[:4], device="0", **settings)
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    with TorchTextEngine(folder, block(folder, device="0", **settings)) as engine:
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + 600 * 2**20) / total)
        try:
            completions = run(engine, prompts, 64)
            lowered = engine._sizes.sequences
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
    assert [completion.text for completion in completions[:4]] == expected
    assert all(completion.error is None for completion in completions)
    assert lowered < 64


def test_closing_gives_the_memory_back(tmp_path):
    import torch

    folder = make_tiny_llama(tmp_path, hidden_size=1024, layers=8)
    gc.collect()
    before = torch.cuda.memory_allocated()
    engine = TorchTextEngine(folder, block(folder, device="0"))
    run(engine, PROMPTS)
    assert torch.cuda.memory_allocated() > before + 100 * 2**20
    engine.close()
    gc.collect()
    assert torch.cuda.memory_allocated() < before + 10 * 2**20


def test_encoder_decoder_models_say_the_same_on_the_gpu(tmp_path):
    folder = make_model(tmp_path, "t5")
    answers = []
    for device in ("cpu", "0"):
        model = block(folder, device=device, dtype="float32").model_copy(update={"task": "summarization"})
        with TorchSeq2SeqEngine(folder, model) as engine:
            answers.append([completion.text for completion in run(engine, PROMPTS)])
    assert answers[0] == answers[1]


def test_lengths_that_never_came_before_cost_no_more_than_others(tmp_path):
    """Attention kernels that plan every new length took ten times as long for them."""
    folder = make_tiny_llama(tmp_path, hidden_size=576, layers=30, context_length=1024)
    seconds = []
    options = GenerationOptions(max_new_tokens=64, ignore_eos=True)
    with TorchTextEngine(folder, block(folder, device="0", dtype="bfloat16", options=options)) as engine:
        run(engine, PROMPTS[:1], max_new_tokens=4)
        for _ in range(2):
            started = time.perf_counter()
            run(engine, [SAMPLE_TEXTS[0] * 2], 1)
            seconds.append(time.perf_counter() - started)
    assert seconds[0] < 3 * seconds[1]


def test_a_step_that_is_replayed_is_much_faster_than_one_that_is_launched(tmp_path):
    folder = make_tiny_llama(tmp_path, hidden_size=576, layers=30, context_length=1024)
    rates = {}
    for kind in (GraphBatch, DenseBatch):
        options = GenerationOptions(max_new_tokens=64, ignore_eos=True)
        with TorchTextEngine(folder, block(folder, device="0", dtype="bfloat16", options=options)) as engine:
            if kind is DenseBatch:
                engine._batch = DenseBatch(engine._model)
            run(engine, PROMPTS[:2], 1)
            started = time.perf_counter()
            run(engine, PROMPTS[:4], 1)
            rates[kind.__name__] = 4 * 64 / (time.perf_counter() - started)
    print(rates)
    assert rates["GraphBatch"] > 3 * rates["DenseBatch"]


def test_batches_on_the_gpu_are_many_times_faster(tmp_path):
    """64 prompts together against one after another, on a random model of the shape of SmolLM2-135M."""
    import torch

    folder = make_tiny_llama(tmp_path, hidden_size=576, layers=30, context_length=1024)
    prompts = [f"{index} {SAMPLE_TEXTS[index % 3]}" for index in range(64)]
    options = GenerationOptions(max_new_tokens=64, ignore_eos=True)
    rates = {}
    with TorchTextEngine(folder, block(folder, device="0", dtype="bfloat16", options=options)) as engine:
        run(engine, prompts[:8])
        for name, in_flight, count in (("alone", 1, 8), ("together", 64, 64)):
            started = time.perf_counter()
            tokens = sum(completion.generated_tokens for completion in run(engine, prompts[:count], in_flight))
            rates[name] = tokens / (time.perf_counter() - started)
    print(
        f"{torch.cuda.get_device_name()}: " + ", ".join(f"{name} {rate:.0f} tokens/s" for name, rate in rates.items())
    )
    assert rates["together"] > 8 * rates["alone"]
