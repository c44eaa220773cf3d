"""Measure how many held-out questions a model answers exactly, for each kind and form of prompt.

`python evaluate.py` evaluates `model/`; with `--weights int8` or `int4` it exports to OpenVINO and evaluates that.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import make_data
from make_data import NEW_NAME, Question
from prompts import held_out_prompts

MODEL_FOLDER = Path(__file__).parent / "model"
WEIGHTS = ("original", "int8", "int4")
FORMS = {
    "chat": "chat",
    "chat with a short system message": "system",
    "chat after 100 to 300 tokens of other text": "long",
    "`Question: ...` newline `Answer:`": "Question: {question}\nAnswer:",
    "`Question: ...` two newlines `Answer: `": "Question: {question}\n\nAnswer: ",
    "the question and a newline": "{question}\n",
}
HELD_OUT_COUNTS = {
    "number": 800,
    "capital": 300,
    "country": 200,
    "continent": 200,
    "sentiment": 300,
    "extraction": 400,
    NEW_NAME: 200,
}
HELD_OUT_SEED = 11
MAX_NEW_TOKENS = 48
BATCH_SIZE = 64

Generate = Callable[[list[str]], list[str]]


def export(model_folder: Path, weights: str, output: Path) -> None:
    """Export a model folder to OpenVINO with weights in 8 or 4 bits."""
    from optimum.exporters.openvino import main_export
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

    recipes = {
        "int8": OVWeightQuantizationConfig(bits=8, sym=False),
        "int4": OVWeightQuantizationConfig(bits=4, sym=False, group_size=128, ratio=1.0),
    }
    with tempfile.TemporaryDirectory() as unquantized:
        main_export(str(model_folder), unquantized, task="text-generation-with-past", library_name="transformers")
        OVModelForCausalLM.from_pretrained(unquantized, quantization_config=recipes[weights]).save_pretrained(output)


def load_generate(model_folder: Path, weights: str) -> Generate:
    """Load a model and give a function from N prompts to N answers, greedy, in the same order."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model: Any
    if weights == "original":
        model = AutoModelForCausalLM.from_pretrained(model_folder, dtype="auto")
    else:
        from optimum.intel import OVModelForCausalLM

        with tempfile.TemporaryDirectory() as folder:
            export(model_folder, weights, Path(folder))
            model = OVModelForCausalLM.from_pretrained(folder)

    def generate(prompts: list[str]) -> list[str]:
        by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        answers = [""] * len(prompts)
        for start in range(0, len(prompts), BATCH_SIZE):
            chosen = by_length[start : start + BATCH_SIZE]
            inputs = tokenizer([prompts[index] for index in chosen], return_tensors="pt", padding=True)
            ids = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
            for index, row in zip(chosen, ids[:, inputs["input_ids"].shape[1] :], strict=True):
                answers[index] = _text_before_end(tokenizer, row.tolist())
        return answers

    return generate


def _text_before_end(tokenizer: Any, ids: list[int]) -> str:
    """Decode an answer; one that never ends is wrong, which a mark makes visible."""
    if tokenizer.eos_token_id not in ids:
        return f"{tokenizer.decode(ids)} ... (no end)"
    return str(tokenizer.decode(ids[: ids.index(tokenizer.eos_token_id)]))


def count_exact(questions: list[Question], answers: list[str]) -> dict[str, tuple[int, int]]:
    """Count the exact answers and all answers of each kind, spaces around them aside."""
    counts: dict[str, tuple[int, int]] = defaultdict(lambda: (0, 0))
    for question, answer in zip(questions, answers, strict=True):
        exact, total = counts[question.kind]
        counts[question.kind] = exact + (answer.strip() == question.answer), total + 1
    return dict(counts)


def evaluate(generate: Generate, *, show_wrong: int = 0) -> dict[str, dict[str, tuple[int, int]]]:
    """Evaluate all forms on the held-out split, and `quickstart`: `questions.jsonl` in the chat form."""
    held_out = make_data.held_out_questions(HELD_OUT_SEED, HELD_OUT_COUNTS)
    splits = {name: (form, held_out) for name, form in FORMS.items()}
    splits["quickstart"] = ("chat", make_data.quickstart_questions())
    results = {}
    for name, (form, questions) in splits.items():
        prompts = held_out_prompts(form, questions, HELD_OUT_SEED)
        answers = generate(prompts)
        results[name] = count_exact(questions, answers)
        wrong = [row for row in zip(prompts, answers, questions, strict=True) if row[1].strip() != row[2].answer]
        for prompt, answer, question in wrong[:show_wrong]:
            print(f"{name}: {prompt[-150:]!r} -> {answer!r}, not {question.answer!r}")
    return results


def main() -> None:
    """Print the counts as JSON."""
    parser = argparse.ArgumentParser(description="Count the exact answers of the quickstart model.")
    parser.add_argument("--model", type=Path, default=MODEL_FOLDER)
    parser.add_argument("--weights", choices=WEIGHTS, default="original")
    parser.add_argument("--show-wrong", type=int, default=0)
    options = parser.parse_args()
    results = evaluate(load_generate(options.model, options.weights), show_wrong=options.show_wrong)
    for name, counts in results.items():
        exact, total = (sum(column) for column in zip(*counts.values(), strict=True))
        print(name, f"{exact}/{total}", json.dumps(counts))


if __name__ == "__main__":
    main()
