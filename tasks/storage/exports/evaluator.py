"""The program of the child process that compares exports with their source.

It is run as a file, like the exporter. The source is loaded first and its answers and distributions are kept in files,
one for each prompt; then each export is loaded by itself, so that no two models are in memory at once.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from prefect_huggingface.tasks.storage.exports.comparisons import compare, log_softmax
from prefect_huggingface.tasks.storage.exports.exporter import die_with_parent, report


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
    expected = [keep_answer(source, prompt, Path(job["work"]) / f"{i}.npy") for i, prompt in enumerate(job["prompts"])]
    speed, job["eos_token_ids"] = source.speed, source.eos_token_ids
    del source
    found = {}
    for name, folder in job["exports"].items():
        report(step="export", name=name)
        candidate = (Seq2SeqExport if make is Seq2SeqSource else CausalExport)(folder, job)
        found[name] = {**compare(candidate, expected, job["eos_token_ids"]), "tokens_per_second": candidate.speed}
        del candidate
    report(step="done", source={"tokens_per_second": speed}, exports=found)


def keep_answer(source: Any, prompt: str, place: Path) -> dict[str, Any]:
    """Let the source answer a prompt, and keep the distribution of each next token in a file."""
    tokens, answer = source.answer(prompt)
    np.save(place, log_softmax(source.logits(tokens, answer)).astype(np.float32))
    return {"tokens": tokens, "answer": answer, "place": str(place), "targets": source.targets(tokens, answer)}


class Stopwatch:
    """Counts generated tokens and the seconds that they took."""

    def __init__(self) -> None:
        self.tokens = 0
        self.seconds = 0.0

    @property
    def speed(self) -> float:
        """Generated tokens per second."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def note(self, tokens: int, started: float) -> None:
        """Add the tokens of one answer."""
        self.tokens += tokens
        self.seconds += time.perf_counter() - started


class CausalSource(Stopwatch):
    """The source of a text-generation model, with torch."""

    kind = "AutoModelForCausalLM"

    def __init__(self, job: dict[str, Any]) -> None:
        super().__init__()
        self.tokenizer, self.model = load_source(job, self.kind)
        self.max_new_tokens = job["max_new_tokens"]

    @property
    def eos_token_ids(self) -> list[int]:
        """Tokens that end an answer."""
        ids = self.model.generation_config.eos_token_id
        return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)

    def answer(self, prompt: str) -> tuple[list[int], list[int]]:
        """Return the tokens of a prompt and those of the greedy answer."""
        import torch

        tokens = self.tokenizer(prompt)["input_ids"]
        started = time.perf_counter()
        with torch.inference_mode():
            made = generate(self.model, tokens, self.max_new_tokens)
        answer = made[len(tokens) :]
        self.note(len(answer), started)
        return tokens, answer

    def logits(self, tokens: list[int], answer: list[int]) -> Any:
        """Return the logits after each token but the last, of prompt and answer."""
        import torch

        with torch.inference_mode():
            return self.model(input_ids=torch.tensor([tokens + answer[:-1]])).logits[0].float().numpy()

    @staticmethod
    def targets(tokens: list[int], answer: list[int]) -> list[int]:
        """Return the token that follows at each position of `logits`."""
        return [*tokens[1:], *answer]


class CausalExport(Stopwatch):
    """An export of a text-generation model: distributions by OpenVINO, answers by OpenVINO GenAI."""

    def __init__(self, folder: str, job: dict[str, Any]) -> None:
        import openvino
        import openvino_genai

        super().__init__()
        device, properties = job["device"], job["ov_config"]
        compiled = openvino.Core().compile_model(f"{folder}/openvino_model.xml", device, properties)
        self.request = compiled.create_infer_request()
        self.inputs = {port.get_any_name(): port for port in compiled.inputs}
        self.pipeline = openvino_genai.LLMPipeline(folder, device, **properties)
        self.config = openvino_genai.GenerationConfig(max_new_tokens=job["max_new_tokens"], do_sample=False)
        self.config.eos_token_id = job["eos_token_ids"][0] if job["eos_token_ids"] else -1
        self.config.stop_token_ids = set(job["eos_token_ids"])

    def logits(self, tokens: list[int], answer: list[int]) -> Any:
        """Return the logits after each token but the last, of prompt and answer."""
        ids = np.array([tokens + answer[:-1]], dtype=np.int64)
        given = {"input_ids": ids, "attention_mask": np.ones_like(ids), "beam_idx": np.zeros(1, dtype=np.int32)}
        given["position_ids"] = np.arange(ids.shape[1], dtype=np.int64)[None]
        self.request.reset_state()
        result = self.request.infer({name: value for name, value in given.items() if name in self.inputs})
        return next(iter(result.values()))[0].copy()

    def answer_tokens(self, tokens: list[int]) -> list[int]:
        """Return the tokens of the greedy answer."""
        import openvino
        import openvino_genai

        ids = np.array([tokens], dtype=np.int64)
        given = openvino_genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids)))
        started = time.perf_counter()
        answer = list(self.pipeline.generate(given, self.config).tokens[0])
        self.note(len(answer), started)
        return answer


class Seq2SeqSource(CausalSource):
    """The source of an encoder-decoder model, with torch."""

    kind = "AutoModelForSeq2SeqLM"

    def answer(self, prompt: str) -> tuple[list[int], list[int]]:
        """Return the tokens of a prompt and those of the greedy answer, the start token first."""
        tokens = self.tokenizer(prompt)["input_ids"]
        return tokens, self.answer_tokens(tokens)

    def answer_tokens(self, tokens: list[int]) -> list[int]:
        """Return the tokens of the greedy answer, the start token first."""
        import torch

        started = time.perf_counter()
        with torch.inference_mode():
            answer = generate(self.model, tokens, self.max_new_tokens)
        self.note(len(answer) - 1, started)
        return answer

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
    """An export of an encoder-decoder model, with Optimum."""

    def __init__(self, folder: str, job: dict[str, Any]) -> None:
        from optimum.intel import OVModelForSeq2SeqLM

        Stopwatch.__init__(self)
        self.model = OVModelForSeq2SeqLM.from_pretrained(folder, device=job["device"], ov_config=job["ov_config"])
        self.max_new_tokens = job["max_new_tokens"]


def load_source(job: dict[str, Any], kind: str) -> tuple[Any, Any]:
    """Return tokenizer and torch model of the source, in the data type of the job."""
    import transformers

    options = {"trust_remote_code": job["trust_remote_code"], "local_files_only": True}
    tokenizer = transformers.AutoTokenizer.from_pretrained(job["source"], **options)
    model = getattr(transformers, kind).from_pretrained(job["source"], dtype=job["dtype"], **options)
    return tokenizer, model.eval()


def generate(model: Any, tokens: list[int], max_new_tokens: int) -> list[int]:
    """Return all tokens that a model of Transformers or Optimum returns for a greedy answer."""
    import torch

    ids = torch.tensor([tokens])
    made = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
    )
    return [int(token) for token in made[0]]


if __name__ == "__main__":
    main(sys.argv[1])
