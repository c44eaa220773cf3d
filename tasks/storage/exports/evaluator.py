"""The program of the child process that compares exports with their source.

It is run as a file, like the exporter. The source is loaded first and its answers and distributions are kept in files,
one for each prompt; then each export is loaded by itself, so that no two models are in memory at once.
"""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from prefect_huggingface.tasks.storage.exports.exporter import (
    PlainEngine,
    PlainModel,
    check_gap,
    die_with_parent,
    report,
)

BATCH = 8
# Positions whose distributions are compared at once; a vocabulary has some hundred thousand entries.
ROW_BLOCK = 256
# The engine computes in the precision of the model's properties, half precision and a KV cache in 8 bits for instance,
# which moves a probability by some hundredths of a nat. Attention that it does not know moves them by far more.
LARGEST_ENGINE_GAP = 0.15


def main(job_path: str) -> None:
    """Compare the exports of a job with their source.

    Args:
        job_path: JSON file with `source`, `exports` (folders by name), `task`, `prompts`, `max_new_tokens`,
            `ov_config`, `device`, `work` and `parent`.
    """
    job = json.loads(Path(job_path).read_text(encoding="utf-8"))
    die_with_parent(int(job["parent"]))
    report(step="source")
    make = Seq2SeqSource if job["task"].startswith("text2text") else CausalSource
    source = make(job)
    answers = source.answer_all([source.tokenizer(prompt)["input_ids"] for prompt in job["prompts"]])
    expected = [keep_answer(source, *answer, Path(job["work"]) / f"{i}.npy") for i, answer in enumerate(answers)]
    speed, job["eos_token_ids"] = source.speed, source.eos_token_ids
    del source
    found = {}
    for name, folder in job["exports"].items():
        report(step="export", name=name)
        candidate = (Seq2SeqExport if make is Seq2SeqSource else CausalExport)(folder, job)
        candidate.answer_all([entry["tokens"] for entry in expected])
        numbers = {**compare(candidate, expected, job["eos_token_ids"]), "tokens_per_second": candidate.speed}
        asked = candidate.ask_engine(expected) if isinstance(candidate, CausalExport) else {}
        found[name] = {**numbers, **asked}
        del candidate
    report(step="done", source={"tokens_per_second": speed}, exports=found)


def keep_answer(source: Any, tokens: list[int], answer: list[int], place: Path) -> dict[str, Any]:
    """Keep the distribution of each next token of a prompt and its answer in a file."""
    np.save(place, log_softmax(source.logits(tokens, answer)).astype(np.float32))
    return {"tokens": tokens, "answer": answer, "place": str(place), "targets": source.targets(tokens, answer)}


class CausalSource:
    """The source of a text-generation model, with torch.

    Attributes:
        speed: Generated tokens per second of one prompt alone.
    """

    kind = "AutoModelForCausalLM"
    starts_with_prompt = True

    def __init__(self, job: dict[str, Any]) -> None:
        self.tokenizer, self.model = load_source(job, self.kind)
        self.max_new_tokens, self.speed = job["max_new_tokens"], 0.0

    @property
    def eos_token_ids(self) -> list[int]:
        """Tokens that end an answer."""
        ids = self.model.generation_config.eos_token_id
        return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)

    def answer_all(self, prompts: list[list[int]]) -> list[tuple[list[int], list[int]]]:
        """Return the tokens of each prompt and those of its greedy answer; in batches, but for the first one."""
        started = time.perf_counter()
        answers = {0: self._generate(prompts[:1])[0]}
        self.speed = (len(answers[0]) - (not self.starts_with_prompt)) / (time.perf_counter() - started)
        # Prompts of similar lengths go together.
        order = sorted(range(1, len(prompts)), key=lambda index: len(prompts[index]))
        for start in range(0, len(order), BATCH):
            part = order[start : start + BATCH]
            answers |= dict(zip(part, self._generate([prompts[index] for index in part]), strict=True))
        self.answers = {tuple(prompts[index]): answer for index, answer in answers.items()}
        return [(tokens, answers[index]) for index, tokens in enumerate(prompts)]

    def answer_tokens(self, tokens: list[int]) -> list[int]:
        """Return the tokens of the greedy answer that was made before."""
        return self.answers[tuple(tokens)]

    def _generate(self, prompts: list[list[int]]) -> list[list[int]]:
        import torch

        width, ends = max(map(len, prompts)), self.eos_token_ids
        # What is filled in is masked; it only has to be a token.
        rows = [[ends[0] if ends else 0] * (width - len(tokens)) + tokens for tokens in prompts]
        mask = [[0] * (width - len(tokens)) + [1] * len(tokens) for tokens in prompts]
        with torch.inference_mode():
            made = self.model.generate(
                input_ids=torch.tensor(rows), attention_mask=torch.tensor(mask), max_new_tokens=self.max_new_tokens,
                do_sample=False, num_beams=1, repetition_penalty=1.0, no_repeat_ngram_size=0,
                pad_token_id=ends[0] if ends else None,
            )  # fmt: skip
        first = 0 if self.starts_with_prompt else 1
        return [cut(row[width:] if self.starts_with_prompt else row, ends, first) for row in made.tolist()]

    def logits(self, tokens: list[int], answer: list[int]) -> Any:
        """Return the logits after each token but the last, of prompt and answer."""
        import torch

        with torch.inference_mode():
            return self.model(input_ids=torch.tensor([tokens + answer[:-1]])).logits[0].float().numpy()

    @staticmethod
    def targets(tokens: list[int], answer: list[int]) -> list[int]:
        """Return the token that follows at each position of `logits`."""
        return [*tokens[1:], *answer]


class CausalExport:
    """An export of a text-generation model: distributions by OpenVINO, answers by the engine's continuous batch.

    Attributes:
        speed: Generated tokens per second of one prompt alone.
    """

    def __init__(self, folder: str, job: dict[str, Any]) -> None:
        import openvino_genai

        self.model = PlainModel(folder, job["device"], job["ov_config"])
        self.engine = PlainEngine(folder, job["device"], job["ov_config"])
        self.config = openvino_genai.GenerationConfig(max_new_tokens=job["max_new_tokens"], do_sample=False)
        self.config.eos_token_id = job["eos_token_ids"][0] if job["eos_token_ids"] else -1
        self.config.stop_token_ids = set(job["eos_token_ids"])

    def answer_all(self, prompts: list[list[int]]) -> None:
        """Answer all prompts in one batch, the first one alone before."""
        started = time.perf_counter()
        alone = self.engine.generate(prompts[:1], self.config)[0].generated_ids
        self.speed = len(alone) / (time.perf_counter() - started)
        made = self.engine.generate(prompts, self.config)
        self.answers = {tuple(tokens): list(one.generated_ids) for tokens, one in zip(prompts, made, strict=True)}

    def answer_tokens(self, tokens: list[int]) -> list[int]:
        """Return the tokens of the greedy answer that was made before."""
        return self.answers[tuple(tokens)]

    def logits(self, tokens: list[int], answer: list[int]) -> Any:
        """Return the logits after each token but the last, of prompt and answer."""
        return self.model.logits(tokens + answer[:-1])

    def ask_engine(self, expected: list[dict[str, Any]]) -> dict[str, float]:
        """Return the perplexity ratio by the engine's own probabilities.

        Raises:
            RuntimeError: If the engine gives other probabilities than the exported model.
        """
        texts = [entry["tokens"] + entry["answer"] for entry in expected]
        given = self.engine.log_probabilities(texts)
        gaps, surprises = [], []
        for entry, probabilities in zip(expected, given, strict=True):
            count = len(entry["targets"])
            rows, chosen = np.arange(count), np.asarray(entry["targets"])
            own = log_softmax(self.logits(entry["tokens"], entry["answer"]))[rows, chosen]
            engine = np.asarray(probabilities[-count:])
            gaps.append(np.abs(own - engine))
            surprises.append(np.load(entry["place"], mmap_mode="r")[rows, chosen] - engine)
        check_gap(float(np.concatenate(gaps).mean()), LARGEST_ENGINE_GAP)
        return {"perplexity_ratio": math.exp(min(float(np.concatenate(surprises).mean()), 50.0))}


class Seq2SeqSource(CausalSource):
    """The source of an encoder-decoder model, with torch. Its answers begin with the start token."""

    kind = "AutoModelForSeq2SeqLM"
    starts_with_prompt = False

    def logits(self, tokens: list[int], answer: list[int]) -> Any:
        """Return the logits after each token of the answer but the last."""
        import torch

        ids = torch.tensor([tokens])
        with torch.inference_mode():
            result = self.model(
                input_ids=ids, attention_mask=torch.ones_like(ids), decoder_input_ids=torch.tensor([answer[:-1]])
            )
        return result.logits[0].float().numpy()

    @staticmethod
    def targets(tokens: list[int], answer: list[int]) -> list[int]:
        """Return the token that follows at each position of `logits`."""
        return answer[1:]


class Seq2SeqExport(Seq2SeqSource):
    """An export of an encoder-decoder model, with Optimum, which answers in the engine as well."""

    def __init__(self, folder: str, job: dict[str, Any]) -> None:
        from optimum.intel import OVModelForSeq2SeqLM

        self.model = OVModelForSeq2SeqLM.from_pretrained(folder, device=job["device"], ov_config=job["ov_config"])
        self.max_new_tokens, self.speed = job["max_new_tokens"], 0.0


def load_source(job: dict[str, Any], kind: str) -> tuple[Any, Any]:
    """Return tokenizer and torch model of the source, in the data type of the job."""
    import transformers

    options = {"trust_remote_code": job["trust_remote_code"], "local_files_only": True}
    tokenizer = transformers.AutoTokenizer.from_pretrained(job["source"], **options)
    model = getattr(transformers, kind).from_pretrained(job["source"], dtype=job["dtype"], **options)
    return tokenizer, model.eval()


def cut(answer: list[int], ends: list[int], first: int) -> list[int]:
    """Return an answer up to the token that ends it; behind that, a batch is filled up."""
    for index in range(first, len(answer)):
        if answer[index] in ends:
            return answer[: index + 1]
    return answer


def compare(candidate: Any, expected: list[dict[str, Any]], ends: list[int]) -> dict[str, Any]:
    """Return how an export differs from its source. The tokens `ends` end an answer.

    Returns:
        `agreement`: share of the positions with the same most likely token; `divergence`: mean Kullback-Leibler
        divergence of the export from the source in nats; `perplexity_ratio`: perplexity of the export over that of the
        source on the given tokens; `exact_matches`: share of the greedy answers that are the same; `positions`.
    """
    agreeing = positions = matches = 0
    divergence = surprise = 0.0
    for entry in expected:
        wanted = np.load(entry["place"], mmap_mode="r")
        got = log_softmax(candidate.logits(entry["tokens"], entry["answer"]))
        targets = np.asarray(entry["targets"])
        positions += len(wanted)
        for start in range(0, len(wanted), ROW_BLOCK):
            reference, found = np.asarray(wanted[start : start + ROW_BLOCK]), got[start : start + ROW_BLOCK]
            rows, chosen = np.arange(len(reference)), targets[start : start + ROW_BLOCK]
            agreeing += int((reference.argmax(-1) == found.argmax(-1)).sum())
            divergence += float((np.exp(reference) * (reference - found)).sum())
            surprise += float((reference[rows, chosen] - found[rows, chosen]).sum())
        matches += without(candidate.answer_tokens(entry["tokens"]), ends) == without(entry["answer"], ends)
    return {
        "agreement": agreeing / positions,
        "divergence": max(divergence / positions, 0.0),
        "perplexity_ratio": math.exp(min(surprise / positions, 50.0)),
        "exact_matches": matches / len(expected),
        "positions": positions,
    }


def without(answer: list[int], ends: list[int]) -> list[int]:
    """Return an answer without the token that ended it; not every library returns that."""
    return answer[:-1] if answer and answer[-1] in ends else answer


def log_softmax(logits: Any) -> Any:
    """Return the logarithms of the probabilities (nats) of each row of logits."""
    logits = np.asarray(logits, dtype=np.float32)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


DEFAULT_PROMPTS: tuple[str, ...] = (
    "The capital of France is Paris, and the capital of Japan is",
    "Water boils at one hundred degrees Celsius at sea level. On a high mountain it boils",
    "Question: What is seven times eight?\nAnswer:",
    "Once upon a time, in a village by the sea, there lived an old fisherman who",
    "def fibonacci(n):\n    \"\"\"Return the n-th Fibonacci number.\"\"\"\n",
    "Translate to German: The weather is nice today and we are going for a walk.",
    "Summarize in one sentence: The council met on Tuesday to discuss the new bridge. After three hours of debate, it "
    "decided to postpone the decision until the cost of repairs to the old bridge is known.",
    "Dear Ms Miller,\n\nthank you for your order. Unfortunately, the item that you chose",
    "The three laws of thermodynamics say that energy",
    "SELECT name, COUNT(*) FROM orders WHERE",
    "A recipe for pancakes: mix two eggs, a cup of milk and a cup of flour. Then",
    "Classify the sentiment as positive or negative.\nReview: The battery died after two days.\nSentiment:",
    "In 1969, for the first time, people walked on",
    "The opposite of hot is cold. The opposite of early is",
    "List three animals that live in the desert:\n1.",
    "If all roses are flowers and some flowers fade quickly, then",
    "{\"name\": \"Ada Lovelace\", \"born\": 1815, \"profession\":",
    "User: How do I reset my password?\nAssistant:",
    "Die Hauptstadt von Deutschland ist Berlin. Die Stadt liegt an",
    "La première guerre mondiale a commencé en",
    "The patient reports a dry cough and a fever for three days. The doctor",
    "To be, or not to be, that is the",
    "Monday, Tuesday, Wednesday, Thursday,",
    "The quick brown fox jumps over the lazy dog. The sentence is known because it",
)  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1])
