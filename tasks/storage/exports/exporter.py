"""The program of the child process that makes one export: export, quantize, verify.

It is run as a file, by `export_process`, and imports nothing of this package, so that it costs what the plain call of
Optimum costs. It reads a JSON job, writes the OpenVINO model into the folder of the job, and reports the steps on its
standard output, one JSON object in a line that starts with `REPORT_MARK`.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import json
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from prefect_huggingface.tasks.storage.exports.vector_exports import (
    VECTOR_EXPORTS,
    add_files,
    optimum_arguments,
    verify_vectors,
)

REPORT_MARK = "@@export@@ "
VERIFIED_TOKENS = 4
ENGINE_BATCH = 8
SHORTEST_CHECK = 64
"""Tokens of the text on which every engine is compared with its model."""
LARGE_WINDOW, LONGEST_CHECK_SECONDS = 1024, 120
"""Beyond a window of more tokens they are compared only if that takes less than `LONGEST_CHECK_SECONDS`."""
LAST_TOKENS = 32
"""Tokens at the end of a text, which are compared by themselves too: they are the farthest beyond the window."""
LOGITS_TOKENS = 1056
"""Tokens whose logits are in memory at once: those of a large vocabulary take a megabyte for each token."""
LARGEST_GAP = 0.02
"""Difference (nats) between engine and model that rounding explains, both in single precision."""
EXACT_PROPERTIES = {
    "INFERENCE_PRECISION_HINT": "f32",
    "KV_CACHE_PRECISION": "f32",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
}
"""With these, the greedy text of a row is the same alone, in any batch, and streamed.

OpenVINO's own defaults compute in bfloat16 where the processor has it, quantize activations to 8 bits by groups, and
keep keys and values in 8 bits; all three round differently for different batches.
"""
OPTIMUM_CLASSES = {
    "text-generation": "OVModelForCausalLM",
    "text2text-generation": "OVModelForSeq2SeqLM",
    "image-text-to-text": "OVModelForVisualCausalLM",
    "feature-extraction": "OVModelForFeatureExtraction",
    "text-classification": "OVModelForSequenceClassification",
}
CHAT_TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
PR_SET_PDEATHSIG, SIGKILL = 1, 9
# Architectures that optimum-intel 2.1 refuses with Transformers 5.5 and that it converts rightly nevertheless; the
# tests compare each of them with its source. The class is the one that sets the limit.
LIFTED_LIMITS = {
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text"), "GemmaOpenVINOConfig"),
    "marian": "MarianOpenVINOConfig",
}
LIFTED_UP_TO = "5.5.99"


def main(job_path: str) -> None:
    """Make the export that a JSON file describes: `source`, `output`, `recipe` and `parent`, the id of the parent."""
    job = json.loads(Path(job_path).read_text(encoding="utf-8"))
    begin_child(int(job["parent"]))
    source, output, recipe = job["source"], Path(job["output"]), job["recipe"]
    started = time.monotonic()
    export_model(source, output, recipe)
    exported = time.monotonic()
    if recipe["quantization"] is not None:
        report(step="quantize")
        quantize_model(source, output, recipe)
    quantized = time.monotonic()
    report(step="verify")
    verify_model(source, output, recipe)
    verified = time.monotonic()
    seconds = {"export": exported - started, "quantize": quantized - exported, "verify": verified - quantized}
    report(step="done", seconds=seconds, peak_memory_bytes=peak_memory(), weights=count_weights(output))


def begin_child(parent: int) -> None:
    """Do what every child does first: see to it that it ends with its parent, and that no library reports its work.

    Args:
        parent: Id of the process that this one ends with, however that happens.
    """
    # OpenVINO and NNCF send what they are used for to Google Analytics, unless this package is missing.
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, SIGKILL)
    # On Windows, a virtual environment puts a process between the two.
    if os.name == "posix" and os.getppid() != parent:
        os._exit(1)

    def watch() -> None:
        # The parent holds the other end of the standard input; it closes when the parent ends.
        os.read(0, 1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def peak_memory() -> int:
    """Return the most memory that this process had (bytes)."""
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        memory = psutil.Process().memory_info()
        return int(getattr(memory, "peak_wset", memory.rss))
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def report(**values: Any) -> None:
    """Tell the parent about a step."""
    print(REPORT_MARK + json.dumps(values), flush=True)


def export_model(source: str, output: Path, recipe: dict[str, Any]) -> None:
    """Convert a checkpoint to OpenVINO, with its tokenizer."""
    # The libraries bring a million objects that stay. Looking through them again and again takes a quarter of the time
    # of a small export.
    gc.disable()
    from optimum.exporters.openvino import main_export
    from optimum.intel import OVConfig

    gc.freeze()
    gc.enable()
    quantization = make_quantization_config(recipe)
    # Without one of them, Optimum would quantize large models by a rule of its own.
    settings = {"quantization_config": quantization} if quantization else {"dtype": recipe["weight_format"]}
    lift_limit(source)
    refuse_missing_weights(unused="pooler." if recipe["task"] == "feature-extraction" else None)
    report(step="export")
    main_export(
        source, output, **optimum_arguments(source, recipe["task"]), library_name="transformers", local_files_only=True,
        trust_remote_code=recipe["trust_remote_code"], convert_tokenizer=True, ov_config=OVConfig(**settings),
    )  # fmt: skip
    if recipe["task"] in VECTOR_EXPORTS:
        add_files(source, output, recipe["task"])


def lift_limit(source: str) -> None:
    """Let Optimum export an architecture that is known to be right with this version of Transformers."""
    from optimum.exporters.openvino import model_configs

    config = json.loads((Path(source) / "config.json").read_text(encoding="utf-8"))
    name = LIFTED_LIMITS.get(config.get("model_type", ""))
    if name is not None:
        getattr(model_configs, name).MAX_TRANSFORMERS_VERSION = LIFTED_UP_TO


def refuse_missing_weights(unused: str | None) -> None:
    """Make Transformers refuse a checkpoint that lacks weights of the model; it would make them up.

    Nothing is computed with weights whose names begin with `unused`.
    """
    from transformers import PreTrainedModel

    load = PreTrainedModel.from_pretrained.__func__

    def from_pretrained(cls: Any, *args: Any, **settings: Any) -> Any:
        wants_info = settings.pop("output_loading_info", False)
        model, found = load(cls, *args, output_loading_info=True, **settings)
        missing = sorted(name for name in found["missing_keys"] if not (unused and name.startswith(unused)))
        if missing:
            named = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
            raise RuntimeError(
                f"The checkpoint lacks weights of the model: {named}. Download it again, or another one."
            )
        return (model, found) if wants_info else model

    PreTrainedModel.from_pretrained = classmethod(from_pretrained)


def make_quantization_config(recipe: dict[str, Any]) -> Any:
    """Return Optimum's configuration object for a recipe, or None."""
    from optimum.intel import OVMixedQuantizationConfig, OVQuantizationConfig, OVWeightQuantizationConfig

    if recipe["quantization"] is None:
        return None
    settings = dict(recipe["quantization"])
    # They are by the part of the model; of one with several parts, the settings are those of its language model.
    for scope in settings.pop("ignored_scopes", {}).values():
        settings["ignored_scope"] = scope
    weight_only = settings.pop("weight_only", True)
    if "weight_quantization_config" in settings:
        return OVMixedQuantizationConfig(**settings)
    if weight_only and "smooth_quant_alpha" not in settings:
        return OVWeightQuantizationConfig(**settings)
    return OVQuantizationConfig(**settings)


def quantize_model(source: str, output: Path, recipe: dict[str, Any]) -> None:
    """Quantize the OpenVINO model of a folder in place."""
    import optimum.intel as classes

    task = optimum_arguments(source, recipe["task"])["task"].removesuffix("-with-past")
    trusted = {"trust_remote_code": recipe["trust_remote_code"]}
    model = getattr(classes, OPTIMUM_CLASSES[task]).from_pretrained(output, compile=False, **trusted)
    config = make_quantization_config(recipe)
    config.tokenizer = config.processor = source  # for the calibration data
    quantizer = classes.OVQuantizer.from_pretrained(model, **trusted)
    quantizer.quantize(
        ov_config=classes.OVConfig(quantization_config=config), save_directory=output, immediate_save=True
    )
    forget_source(output / "openvino_config.json")


def forget_source(config_path: Path) -> None:
    """Take the place of the source out of the configuration of an export; it is gone afterwards."""
    if config_path.is_file():
        config = json.loads(config_path.read_text(encoding="utf-8"))
        quantization = config.get("quantization_config") or {}
        quantization.update({name: None for name in ("tokenizer", "processor") if name in quantization})
        config_path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def verify_model(source: str, output: Path, recipe: dict[str, Any]) -> None:
    """Load the export as the engine does, and compute something with it.

    Raises:
        RuntimeError: If something is missing, or nothing is generated.
    """
    vector, causal = recipe["task"] in VECTOR_EXPORTS, recipe["task"].startswith("text-generation")
    needed = ["config.json", "tokenizer.json" if vector else "tokenizer_config.json"]
    # OpenVINO GenAI has its own tokenizer models; encoder-decoder models are run with the tokenizer of Transformers.
    needed += ["openvino_tokenizer.xml", "openvino_detokenizer.xml"] if causal else []
    for name in needed:
        if not (output / name).is_file():
            raise RuntimeError(f"The export is not complete: {name} is missing.")
    if vector:
        verify_vectors(output)
        return
    if has_chat_template(Path(source)) and not has_chat_template(output):
        raise RuntimeError("The export is not complete: the chat template is missing.")
    generated = check_engine(output) if causal else generate_with_optimum(output, recipe)
    if generated != VERIFIED_TOKENS:
        raise RuntimeError(f"The export generated {generated} tokens instead of {VERIFIED_TOKENS}.")


def has_chat_template(folder: Path) -> bool:
    """Tell whether the tokenizer of a folder has a chat template."""
    config = folder / "tokenizer_config.json"
    in_config = config.is_file() and json.loads(config.read_text(encoding="utf-8")).get("chat_template")
    return bool(in_config) or any((folder / name).is_file() for name in CHAT_TEMPLATE_FILES)


def check_engine(output: Path) -> int:
    """Return how many tokens the continuous batch that will answer generates.

    Its probabilities are held against the model's own, on a short text and on one that is twice as long as a sliding
    window. A window above `LARGE_WINDOW` is checked only if that takes less than `LONGEST_CHECK_SECONDS`.

    Raises:
        RuntimeError: If the engine cannot run the model, or gives other probabilities.
    """
    import openvino_genai

    model, engine = load_plainly(str(output), "CPU", EXACT_PROPERTIES)
    config = json.loads((output / "config.json").read_text(encoding="utf-8"))
    config |= config.get("text_config") or {}
    window = attention_window(config)
    text, longer = checked_tokens(config, SHORTEST_CHECK), checked_tokens(config, 2 * window)
    started = time.monotonic()
    check_probabilities(model, engine, [text, *(text[: len(text) - 3 * step] for step in range(1, ENGINE_BATCH))])
    seconds = (time.monotonic() - started) / len(text) * len(longer)
    if len(longer) > len(text) and (window <= LARGE_WINDOW or seconds < LONGEST_CHECK_SECONDS):
        check_probabilities(model, engine, [longer[: len(longer) // part] for part in range(1, ENGINE_BATCH + 1)])
    generation = openvino_genai.GenerationConfig(max_new_tokens=VERIFIED_TOKENS, do_sample=False, ignore_eos=True)
    return len(engine.generate([text], generation)[0].generated_ids)


def check_probabilities(model: PlainModel, engine: PlainEngine, texts: list[list[int]]) -> None:
    """Hold the engine's probabilities against the model's own: of the first text alone, and with all in one batch.

    The others are beginnings of the first text.

    Raises:
        RuntimeError: If they differ.
    """
    own = model.log_probabilities(texts[0])
    for batch in (texts[:1], texts):
        for tokens, found in zip(batch, engine.log_probabilities(batch), strict=True):
            gaps = [abs(a - b) for a, b in zip(own[: len(tokens) - 1], found, strict=True)]
            for some in (gaps, gaps[-LAST_TOKENS:]):
                check_gap(sum(some) / len(some), LARGEST_GAP)


def attention_window(config: dict[str, Any]) -> int:
    """Return the number of tokens that a token attends to, 0 where it is all before it."""
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    window = window if isinstance(window, int) else config.get("window_size")
    return window if isinstance(window, int) and window > 0 else 0


def checked_tokens(config: dict[str, Any], length: int) -> list[int]:
    """Return tokens of all parts of the vocabulary, as many as asked for and the model takes."""
    positions = config.get("max_position_embeddings") or config.get("n_positions")
    if isinstance(positions, int):
        length = min(length, positions - VERIFIED_TOKENS)
    size = max(int(config.get("vocab_size") or 100), 16)
    return [8 + (7919 * index) % (size - 8) for index in range(length)]


def check_gap(gap: float, largest: float) -> None:
    """Refuse a model whose probabilities the engine computes otherwise; `gap` is the mean difference in nats.

    Raises:
        RuntimeError: If the gap is too large.
    """
    if not gap <= largest:
        raise RuntimeError(
            f"The continuous batch of OpenVINO gives other probabilities than the exported model, {gap:.3f} nats apart "
            "on average: it does not compute the attention of this architecture. Use `backend='torch'`."
        )


class PlainModel:
    """The exported model itself, without the engine, compiled with properties of OpenVINO."""

    def __init__(self, folder: str, device: str, properties: dict[str, Any]) -> None:
        import openvino

        compiled = openvino.Core().compile_model(f"{folder}/openvino_model.xml", device, properties)
        self.request = compiled.create_infer_request()
        self.inputs = {port.get_any_name() for port in compiled.inputs}

    def logits(self, tokens: list[int], before: int = 0) -> Any:
        """Return the logits after each token; so many tokens came `before` them."""
        import numpy as np

        ids, stop = np.array([tokens], dtype=np.int64), before + len(tokens)
        given = {"input_ids": ids, "attention_mask": np.ones((1, stop), np.int64), "beam_idx": np.zeros(1, np.int32)}
        given["position_ids"] = np.arange(before, stop, dtype=np.int64)[None]
        if not before:
            self.request.reset_state()
        result = self.request.infer({name: value for name, value in given.items() if name in self.inputs})
        return next(iter(result.values()))[0].copy()

    def log_probabilities(self, tokens: list[int]) -> list[float]:
        """Return the logarithm of the probability (nats) of each token but the first."""
        found: list[float] = []
        for start in range(0, len(tokens) - 1, LOGITS_TOKENS):
            part, targets = (tokens[begin : begin + LOGITS_TOKENS] for begin in (start, start + 1))
            rows = log_softmax(self.logits(part, start))
            found += [float(row[target]) for row, target in zip(rows, targets, strict=False)]
        return found


def log_softmax(logits: Any) -> Any:
    """Return the logarithms of the probabilities (nats) of each row of logits."""
    import numpy as np

    logits = np.asarray(logits, dtype=np.float32)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


class PlainEngine:
    """The continuous batch of OpenVINO GenAI, as the engine has it."""

    def __init__(self, folder: str, device: str, properties: dict[str, Any]) -> None:
        import openvino_genai

        sizes = openvino_genai.SchedulerConfig()
        # Tokens out of the cache have no probabilities.
        sizes.enable_prefix_caching, sizes.cache_size = False, 0
        self.pipeline = openvino_genai.ContinuousBatchingPipeline(folder, sizes, device, properties)
        self.ids = itertools.count()

    def generate(self, prompts: list[list[int]], config: Any) -> list[Any]:
        """Return what is generated for each prompt, all of them in one batch."""
        import numpy as np
        import openvino

        handles = []
        for tokens in prompts:
            ids = openvino.Tensor(np.array([tokens], dtype=np.int64))
            handles.append(self.pipeline.add_request(next(self.ids), ids, config))
        while self.pipeline.has_non_finished_requests():
            self.pipeline.step()
        return [handle.read_all()[0] for handle in handles]

    def log_probabilities(self, texts: list[list[int]]) -> list[list[float]]:
        """Return the logarithms of the probabilities (nats) of the tokens of each text but the first."""
        import openvino_genai

        config = openvino_genai.GenerationConfig(max_new_tokens=1, do_sample=False, ignore_eos=True)
        config.echo, config.logprobs = True, 1
        made = self.generate(texts, config)
        return [list(one.generated_log_probs[1 : len(tokens)]) for one, tokens in zip(made, texts, strict=True)]


def load_plainly(folder: str, device: str, properties: dict[str, Any]) -> tuple[PlainModel, PlainEngine]:
    """Return the exported model and the engine on it. OpenVINO compiles on one core, so that both are done at once."""
    with ThreadPoolExecutor(1) as beside:
        model = beside.submit(PlainModel, folder, device, properties)
        engine = PlainEngine(folder, device, properties)
        return model.result(), engine


def generate_with_optimum(output: Path, recipe: dict[str, Any]) -> int:
    """Return the number of tokens that Optimum generates from the export."""
    import optimum.intel as classes
    from transformers import AutoTokenizer

    vision = recipe["task"] == "image-text-to-text"
    kind = getattr(classes, OPTIMUM_CLASSES[recipe["task"].removesuffix("-with-past")])
    model = kind.from_pretrained(output, trust_remote_code=recipe["trust_remote_code"])
    tokens = AutoTokenizer.from_pretrained(output)("The verification of an export", return_tensors="pt")
    made = model.generate(
        **tokens, max_new_tokens=VERIFIED_TOKENS, min_new_tokens=VERIFIED_TOKENS, do_sample=False, num_beams=1
    )
    return int(made.shape[-1] - (tokens["input_ids"].shape[-1] if vision else 1))


def count_weights(output: Path) -> dict[str, float]:
    """Return the share of the weights in each data type."""
    import math

    import openvino

    counts: dict[str, int] = {}
    for path in output.glob("openvino_*.xml"):
        if "tokenizer" in path.name:
            continue
        for node in openvino.Core().read_model(path).get_ops():
            if node.get_type_name() == "Constant" and len(node.shape) > 1:
                kind = node.get_element_type().get_type_name()
                counts[kind] = counts.get(kind, 0) + math.prod(node.shape)
    total = sum(counts.values()) or 1
    return {kind: round(count / total, 4) for kind, count in sorted(counts.items())}


if __name__ == "__main__":
    main(sys.argv[1])
