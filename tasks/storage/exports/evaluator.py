"""The program of the child process that compares exports with their source.

It is run as a file, like the exporter. The source is loaded first and its answers and distributions are kept in files,
one for each prompt; then each export is loaded by itself, so that no two models are in memory at once.
"""

from __future__ import annotations

import gc
import json
import math
import sys
import time
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from prefect_huggingface.tasks.storage.exports.exporter import (
    begin_child,
    check_gap,
    load_plainly,
    log_softmax,
    report,
)

# Entries of the logits of one batch of the source, a quarter of a gigabyte, of which there are three copies at once.
LARGEST_LOGITS = 1 << 26
# Tokens of one batch of the source, prompts and answers, whose keys and values take a gigabyte or so.
LARGEST_BATCH = 8192
ROW_BLOCK = 256
SPEED_TOKENS = 16
# The engine computes in the precision of the model's properties, half precision and a KV cache in 8 bits for instance,
# which moves a probability by some hundredths of a nat. Attention that it does not know moves them by far more.
LARGEST_ENGINE_GAP = 0.15


def main(job_path: str) -> None:
    """Compare exports with their source.

    The JSON file has `source`, `exports` (folders by name), `task`, `prompts`, `max_new_tokens`, `ov_config`, `device`,
    `dtype`, `trust_remote_code`, `work` and `parent`.
    """
    job = json.loads(Path(job_path).read_text(encoding="utf-8"))
    begin_child(int(job["parent"]))
    report(step="source")
    kinds = (Seq2SeqSource, Seq2SeqExport) if job["task"].startswith("text2text") else (CausalSource, CausalExport)
    gc.disable()  # as in the exporter: the libraries bring a million objects that stay
    source = kinds[0](job)
    gc.freeze()
    gc.enable()
    prompts = [source.tokenizer(prompt)["input_ids"] for prompt in job["prompts"]]
    kept = {
        index: keep_answer(prompts[index], answer, logits, Path(job["work"]) / f"{index}.npy")
        for index, (answer, logits) in source.answer_all(prompts)
    }
    expected = [kept[index] for index in range(len(prompts))]
    speed, job["eos_token_ids"] = source.speed, source.eos_token_ids
    del source
    gc.unfreeze()  # what holds the source by a cycle goes with it
    gc.collect()
    found = {}
    for name, folder in job["exports"].items():
        report(step="export", name=name)
        candidate = kinds[1](folder, job)
        found[name] = {**compare(candidate, expected, job["eos_token_ids"]), "tokens_per_second": candidate.speed}
        del candidate
    report(step="done", source={"tokens_per_second": speed}, exports=found)


def keep_answer(tokens: list[int], answer: list[int], logits: Any, place: Path) -> dict[str, Any]:
    """Keep the distribution of each next token of a prompt and its answer in a file.

    The logits are those before the last tokens, as many as there are.
    """
    np.save(place, log_softmax(logits))
    return {"tokens": tokens, "answer": answer, "place": str(place), "targets": [*tokens, *answer][-len(logits) :]}


class CausalSource:
    """The source of a text-generation model, with torch. `speed` is in tokens per second of one prompt alone."""

    kind = "AutoModelForCausalLM"
    takes_padding = True

    def __init__(self, job: dict[str, Any]) -> None:
        import transformers

        options = {"trust_remote_code": job["trust_remote_code"], "local_files_only": True}
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(job["source"], **options)
        kind = getattr(transformers, self.kind)
        self.model = kind.from_pretrained(job["source"], dtype=job["dtype"], **options).eval()
        self.max_new_tokens, self.speed = job["max_new_tokens"], 0.0

    @property
    def eos_token_ids(self) -> list[int]:
        """Tokens that end an answer."""
        ids = self.model.generation_config.eos_token_id
        return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)

    def answer_all(self, prompts: list[list[int]]) -> Iterator[tuple[int, tuple[list[int], Any]]]:
        """Yield the number of each prompt with its greedy answer and the logits before the tokens of both.

        They are computed in batches, prompts of similar lengths together.
        """
        started = time.perf_counter()
        _, logits = self._generate(prompts[:1], min(SPEED_TOKENS, self.max_new_tokens))
        self.speed = logits.shape[1] / (time.perf_counter() - started)
        longest = max(map(len, prompts)) + self.max_new_tokens
        size = min(LARGEST_LOGITS // (logits.shape[2] * self.max_new_tokens), LARGEST_BATCH // longest)
        size = max(1, size)
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        for _, group in groupby(order, lambda index: 0 if self.takes_padding else len(prompts[index])):
            alike = list(group)
            for part in (alike[start : start + size] for start in range(0, len(alike), size)):
                yield from zip(part, self._answer([prompts[index] for index in part]), strict=True)

    def _answer(self, prompts: list[list[int]]) -> Iterator[tuple[list[int], Any]]:
        import torch

        made, logits = self._generate(prompts, self.max_new_tokens)
        for tokens, row, last in zip(prompts, made, logits, strict=True):
            answer = cut(row[-len(last) :], self.eos_token_ids, 0)
            with torch.inference_mode():
                first = self.model(input_ids=torch.tensor([tokens])).logits[0, :-1].float().numpy()
            yield answer, np.concatenate((first, last[: len(answer)]))

    def _generate(self, prompts: list[list[int]], max_new_tokens: int) -> tuple[list[list[int]], Any]:
        """Return the rows of tokens that are generated greedily, and the logits of the new ones."""
        import torch

        width, fill = max(map(len, prompts)), (self.eos_token_ids or [0])[:1]
        # What is filled in is masked; it only has to be a token.
        rows = [fill * (width - len(tokens)) + tokens for tokens in prompts]
        mask = [[0] * (width - len(tokens)) + [1] * len(tokens) for tokens in prompts]
        with torch.inference_mode():
            made = self.model.generate(
                input_ids=torch.tensor(rows), attention_mask=torch.tensor(mask), max_new_tokens=max_new_tokens,
                do_sample=False, num_beams=1, repetition_penalty=1.0, no_repeat_ngram_size=0,
                pad_token_id=fill[0] if self.eos_token_ids else None, output_logits=True, return_dict_in_generate=True,
            )  # fmt: skip
        return made.sequences.tolist(), torch.stack(made.logits, 1).float().numpy()


class CausalExport:
    """An export of a text-generation model: distributions by OpenVINO, answers by the engine's continuous batch."""

    def __init__(self, folder: str, job: dict[str, Any]) -> None:
        import openvino_genai

        self.model, self.engine = load_plainly(folder, job["device"], job["ov_config"])
        self.config = openvino_genai.GenerationConfig(max_new_tokens=job["max_new_tokens"], do_sample=False)
        self.config.eos_token_id = job["eos_token_ids"][0] if job["eos_token_ids"] else -1
        self.config.stop_token_ids = set(job["eos_token_ids"])
        self.speed = 0.0

    def answer(self, prompts: list[list[int]]) -> list[list[int]]:
        """Return the greedy answers to all prompts, made in one batch; the first one is made alone before."""
        started = time.perf_counter()
        alone = self.engine.generate(prompts[:1], self.config)[0].generated_ids
        self.speed = len(alone) / (time.perf_counter() - started)
        return [list(one.generated_ids) for one in self.engine.generate(prompts, self.config)]

    def logits(self, tokens: list[int], answer: list[int]) -> Any:
        """Return the logits after each token but the last, of prompt and answer."""
        return self.model.logits(tokens + answer[:-1])

    def log_probabilities(self, texts: list[list[int]]) -> list[list[float]]:
        """Return the logarithms of the probabilities (nats) of the tokens of each text but the first, by the engine."""
        return self.engine.log_probabilities(texts)


class Seq2SeqSource(CausalSource):
    """The source of an encoder-decoder model, with torch. Its answers begin with the start token."""

    kind = "AutoModelForSeq2SeqLM"
    takes_padding = False  # the encoders of Marian and BART count the positions of what is filled in

    def _answer(self, prompts: list[list[int]]) -> Iterator[tuple[list[int], Any]]:
        made, logits = self._generate(prompts, self.max_new_tokens)
        for tokens, found in zip(made, logits, strict=True):
            answer = cut(tokens, self.eos_token_ids, 1)
            yield answer, found[: len(answer) - 1]


class Seq2SeqExport(Seq2SeqSource):
    """An export of an encoder-decoder model, with Optimum, which answers in the engine as well."""

    def __init__(self, folder: str, job: dict[str, Any]) -> None:
        from optimum.intel import OVModelForSeq2SeqLM

        self.model = OVModelForSeq2SeqLM.from_pretrained(folder, device=job["device"], ov_config=job["ov_config"])
        self.max_new_tokens, self.speed = job["max_new_tokens"], 0.0

    def answer(self, prompts: list[list[int]]) -> list[list[int]]:
        """Return the greedy answers to all prompts."""
        return [answer for _, (answer, _) in sorted(self.answer_all(prompts), key=lambda entry: entry[0])]

    def logits(self, tokens: list[int], answer: list[int]) -> Any:
        """Return the logits after each token of the answer but the last."""
        import torch

        ids = torch.tensor([tokens])
        with torch.inference_mode():
            result = self.model(
                input_ids=ids, attention_mask=torch.ones_like(ids), decoder_input_ids=torch.tensor([answer[:-1]])
            )
        return result.logits[0].float().numpy()


def cut(answer: list[int], ends: list[int], first: int) -> list[int]:
    """Return an answer up to the token that ends it; behind that, a batch is filled up."""
    end = next((index for index in range(first, len(answer)) if answer[index] in ends), len(answer))
    return answer[: end + 1]


def compare(candidate: Any, expected: list[dict[str, Any]], ends: list[int]) -> dict[str, Any]:
    """Return how an export differs from its source. The tokens `ends` end an answer.

    Returns:
        `agreement`: share of the positions with the same most likely token; `divergence`: mean Kullback-Leibler
        divergence of the export from the source in nats; `perplexity_ratio`: perplexity of the export over that of the
        source on the given tokens, by the engine's own probabilities where it tells them; `exact_matches`: share of the
        greedy answers that are the same; `positions`.

    Raises:
        RuntimeError: If the engine gives other probabilities than the exported model.
    """
    agreeing, divergence = 0, 0.0
    wanted_chosen, found_chosen = [], []
    for entry in expected:
        kept, logits = np.load(entry["place"], mmap_mode="r"), candidate.logits(entry["tokens"], entry["answer"])
        of_entry = []
        for start in range(0, len(kept), ROW_BLOCK):
            block = slice(start, start + ROW_BLOCK)
            wanted, found = np.asarray(kept[block]), log_softmax(logits[block])
            agreeing += int((wanted.argmax(-1) == found.argmax(-1)).sum())
            divergence += float((np.exp(wanted) * (wanted - found)).sum())
            chosen = np.arange(len(wanted)), np.asarray(entry["targets"][block])
            wanted_chosen.append(wanted[chosen])
            of_entry.append(found[chosen])
        found_chosen.append(np.concatenate(of_entry))
    reference, given = np.concatenate(wanted_chosen), np.concatenate(found_chosen)
    if isinstance(candidate, CausalExport):
        told = candidate.log_probabilities([entry["tokens"] + entry["answer"] for entry in expected])
        engine = np.concatenate([one[-len(own) :] for one, own in zip(told, found_chosen, strict=True)])
        check_gap(float(np.abs(given - engine).mean()), LARGEST_ENGINE_GAP)
        given = engine
    pairs = zip(candidate.answer([entry["tokens"] for entry in expected]), expected, strict=True)
    matches = sum(without(answer, ends) == without(entry["answer"], ends) for answer, entry in pairs)
    return {
        "agreement": agreeing / len(given),
        "divergence": max(divergence / len(given), 0.0),
        "perplexity_ratio": math.exp(min(float((reference - given).mean()), 50.0)),
        "exact_matches": matches / len(expected),
        "positions": len(given),
    }


def without(answer: list[int], ends: list[int]) -> list[int]:
    """Return an answer without the token that ended it; not every library returns that."""
    return answer[:-1] if answer and answer[-1] in ends else answer


if __name__ == "__main__":
    main(sys.argv[1])
