"""Engines for vectors and scores: what waits is sorted by length and computed in batches, for all callers together.

Plain OpenVINO with batches of our own, and not OpenVINO GenAI's `TextEmbeddingPipeline`: with real MiniLM weights GenAI
2026.4 took 26.4 ms of processor time for a text, its documents sorted by length too, and this way 17.5 ms, the same
vectors; and GenAI tells neither the tokens nor the error of one text. Batches are small, so that what is computed
stays in the cache of the processor.
"""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect.logging import get_logger

from prefect_huggingface.blocks import LocalModel
from prefect_huggingface.tasks.engines.base import RequestError
from prefect_huggingface.tasks.engines.detokenizer import RustTokenizer
from prefect_huggingface.tasks.engines.embedding_inputs import EmbeddingInputs, EncodedText, ModelFiles
from prefect_huggingface.tasks.engines.openvino_runtime import choose_device, compile_properties, loading_error
from prefect_huggingface.tasks.engines.request_state import RequestState
from prefect_huggingface.tasks.engines.worker import EngineWorker
from prefect_huggingface.tasks.errors import EngineError
from prefect_huggingface.tasks.storage.exports.vector_exports import read_answer_rows

if TYPE_CHECKING:
    import numpy as np

    Arrays = dict[str, np.ndarray]

logger = get_logger(__name__)

# Texts of which batches of similar length are made, and the most tokens, padding included, and rows of one batch.
WINDOW = 2048
MAX_BATCH_TOKENS = 512
MAX_BATCH_ROWS = 32
SMALLEST_NORM = 1e-12


class OpenVINONetwork:
    """Model of an OpenVINO folder. Batches are computed side by side, one for each stream of the device.

    Attributes:
        slots: How many batches may be under way.
    """

    def __init__(self, folder: Path, model: LocalModel) -> None:
        device = choose_device(model)
        properties = {"PERFORMANCE_HINT": "THROUGHPUT", **compile_properties(model)}
        try:
            import openvino

            core = openvino.Core()
            compiled = core.compile_model(core.read_model(folder / "openvino_model.xml"), device, properties)
        except Exception as exc:
            raise loading_error(folder, device, exc) from exc
        self._names = {port.get_any_name() for port in compiled.inputs}
        unknown = self._names - {"input_ids", "attention_mask", "token_type_ids", "position_ids"}
        if unknown:
            raise EngineError(
                f"The OpenVINO model in {str(folder)!r} takes {', '.join(sorted(unknown))}, so that it is none for "
                f"task {model.task!r}. Give the checkpoint that it was made from."
            )
        # One more than there are streams, so that none of them waits for the thread of the engine.
        self.slots = int(compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")) + 1
        self._idle = [compiled.create_infer_request() for _ in range(self.slots)]

    def start(self, inputs: Arrays) -> Callable[[], np.ndarray]:
        """Start a batch, and return what waits for its first output: hidden states or logits.

        Args:
            inputs: `input_ids`, `attention_mask` and `token_type_ids`, each int64 of [rows, tokens].
        """
        import numpy as np

        if "position_ids" in self._names:
            rows, length = inputs["input_ids"].shape
            inputs = {**inputs, "position_ids": np.tile(np.arange(length, dtype=np.int64), (rows, 1))}
        request = self._idle.pop()
        try:
            request.start_async({name: value for name, value in inputs.items() if name in self._names})
        except BaseException:
            self._idle.append(request)
            raise

        def wait() -> np.ndarray:
            try:
                request.wait()
                return np.array(request.get_output_tensor(0).data, dtype=np.float32)
            finally:
                self._idle.append(request)

        return wait

    def check(self) -> None:
        """Raise where the device answers nobody any more."""


class TorchNetwork:
    """Model of Transformers, used as that of an OpenVINO folder is."""

    slots = 1

    def __init__(self, folder: Path, model: LocalModel, auto_class: str) -> None:
        import inspect

        from prefect_huggingface.tasks.engines.torch_loading import input_device, load_torch_model

        self._model = load_torch_model(folder, model, auto_class)
        self._device = input_device(self._model)
        self._names = set(inspect.signature(self._model.forward).parameters)

    def start(self, inputs: Arrays) -> Callable[[], np.ndarray]:
        """Compute a batch, and return what gives its output."""
        import torch

        tensors = {
            name: torch.from_numpy(value).to(self._device) for name, value in inputs.items() if name in self._names
        }
        with torch.inference_mode():
            found: np.ndarray = self._model(**tensors)[0].float().cpu().numpy()
        return lambda: found

    def check(self) -> None:
        """Raise where the device answers nobody any more."""
        from prefect_huggingface.tasks.engines.torch_loading import check_device

        check_device(self._model)


@dataclass(slots=True)
class Batch:
    """Requests that are computed together; one that has ended in the meantime is None."""

    states: list[RequestState | None]
    mask: np.ndarray
    wait: Callable[[], np.ndarray]


class EmbeddingEngine(EngineWorker):
    """Model for vectors (task "feature-extraction") or scores ("text-ranking") in one thread.

    The completion of a request has a `vector`: the vector of its text, or the one score of its pair.
    """

    inputs: EmbeddingInputs
    in_flight = WINDOW

    def __init__(self, folder: Path, model: LocalModel) -> None:
        """Load a checkpoint or an OpenVINO model.

        Raises:
            EngineError: If it cannot be loaded, or is none for its task.
        """
        files = ModelFiles(folder, model.embedding)
        is_ranker = model.task == "text-ranking"
        if is_ranker and not (files.is_scored or files.is_causal):
            raise EngineError(
                f"The model in {str(folder)!r} gives no scores: it was made as {files.config.get('architectures')}. "
                "Use a reranker, or set `task='feature-extraction'`."
            )
        inputs = EmbeddingInputs(folder, files, _tokenizer_of(folder, model), is_ranker)
        self._network: OpenVINONetwork | TorchNetwork
        if model.backend == "openvino":
            self._network = OpenVINONetwork(folder, model)
        else:
            is_scored = is_ranker and files.is_scored
            auto_class = "AutoModelForSequenceClassification" if is_scored else "AutoModel"
            self._network = TorchNetwork(folder, model, auto_class)
        self._answer_rows = _answer_rows(folder, inputs) if is_ranker and files.is_causal else None
        # The tokens of each waiting request, sorted by their number, and the requests in the order in which they came.
        self._sorted: list[tuple[int, int, RequestState]] = []
        self._waiting: dict[RequestState, int] = {}
        self._batches: deque[Batch] = deque()
        # Those of a batch that failed are computed alone.
        self._suspects: set[RequestState] = set()
        self._number = 0
        super().__init__(inputs)

    def add(self, state: RequestState) -> None:
        """Take in a request whose state has begun."""
        self._number += 1
        self._waiting[state] = self._number
        bisect.insort(self._sorted, (len(state.encoded.ids), self._number, state))

    def remove(self, state: RequestState) -> None:
        """Take a request out, wherever it is."""
        self._suspects.discard(state)
        number = self._waiting.pop(state, None)
        if number is not None:
            del self._sorted[bisect.bisect_left(self._sorted, (len(state.encoded.ids), number))]
            return
        for batch in self._batches:
            batch.states = [None if other is state else other for other in batch.states]

    def step(self) -> None:
        """Keep the model busy, and finish the oldest batch."""
        while self._waiting and len(self._batches) < self._network.slots:
            self._start(self._next_states())
        if self._batches:
            self._finish(self._batches.popleft())

    def reset(self) -> None:
        """Wait for what is still computed for requests that are gone."""
        while self._batches:
            self._batches.popleft().wait()
        self._network.check()

    def release(self) -> None:
        """Let go of the model."""
        while self._batches:
            with suppress(Exception):
                self._batches.popleft().wait()
        del self._network

    def leftovers(self) -> list[str]:
        """Return what the engine still holds though no request is active. For tests."""
        running = sum(any(batch.states) for batch in self._batches)
        return [f"{count} {name}" for count, name in ((len(self._sorted), "texts"), (running, "batches")) if count]

    def _next_states(self) -> list[RequestState]:
        """Take out the request that has waited the longest, and those of the most similar lengths."""
        oldest, number = next(iter(self._waiting.items()))
        place = bisect.bisect_left(self._sorted, (len(oldest.encoded.ids), number))
        first, last = place, place + 1
        # Shorter texts cost only their padding, longer ones make all rows longer.
        while last - first < MAX_BATCH_ROWS and not self._suspects:
            below = first > 0 and (last - first + 1) * self._sorted[last - 1][0] <= MAX_BATCH_TOKENS
            above = last < len(self._sorted) and (last - first + 1) * self._sorted[last][0] <= MAX_BATCH_TOKENS
            if below and above:
                length = self._sorted[place][0]
                below = length - self._sorted[first - 1][0] <= self._sorted[last][0] - length
            if below:
                first -= 1
            elif above:
                last += 1
            else:
                break
        taken = [entry[2] for entry in self._sorted[first:last]]
        del self._sorted[first:last]
        for state in taken:
            del self._waiting[state]
        return taken

    def _start(self, states: list[RequestState]) -> None:
        import numpy as np

        rows, length = len(states), max(len(state.encoded.ids) for state in states)
        ids = np.full((rows, length), self.inputs.pad_id, dtype=np.int64)
        mask, types = np.zeros_like(ids), np.zeros_like(ids)
        for row, state in enumerate(states):
            encoded: EncodedText = state.encoded
            size = len(encoded.ids)
            ids[row, :size], mask[row, :size], types[row, :size] = encoded.ids, 1, encoded.type_ids
        inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
        try:
            self._batches.append(Batch(list(states), mask, self._network.start(inputs)))
        except Exception as exc:
            self._recover(states, exc)

    def _finish(self, batch: Batch) -> None:
        import numpy as np

        try:
            output = batch.wait()
        except Exception as exc:
            self._recover([state for state in batch.states if state is not None and not state.is_done], exc)
            return
        for row, state in enumerate(batch.states):
            if state is None or state.is_done:
                continue
            try:
                vector = self._vector(output[row], int(batch.mask[row].sum()), state.encoded.options)
                if not np.isfinite(vector).all():
                    raise RequestError(
                        "engine_error", "The model gave no finite numbers. Use a data type of more bits for it."
                    )
                state.vector = vector
                state.end("stop")
            except Exception as exc:
                state.fail_with(exc, "The vector cannot be made", "Report it.")

    def _recover(self, states: list[RequestState], error: Exception) -> None:
        """Let the requests of a failed batch run one by one, and fail the one that was alone in it."""
        self._network.check()
        if len(states) == 1:
            states[0].fail_with(error, "The text makes the model fail", "Change it.")
            return
        logger.warning("A batch of %d texts failed; they are computed one by one: %s", len(states), error)
        for state in states:
            self._suspects.add(state)
            self.add(state)

    def _vector(self, output: np.ndarray, length: int, options: Any) -> np.ndarray:
        """Return the vector of a text, or the score of a pair, float32.

        Args:
            output: Hidden states of [tokens, hidden], or the outputs of a head.
            length: Number of tokens without padding.
            options: How the vector is made.
        """
        import numpy as np

        if self.inputs.is_ranker:
            return self._score(output, length, options)
        vector = pool(output[:length], options.pooling)
        for layer in self.inputs.files.dense:
            vector = layer.weight @ vector + (0 if layer.bias is None else layer.bias)
            vector = np.tanh(vector) if layer.activation == "Tanh" else vector
        if options.dimensions is not None:
            if options.dimensions > len(vector):
                raise RequestError(
                    "invalid_option",
                    f"`dimensions` must be at most {len(vector)} with this model, got {options.dimensions}. Lower it.",
                )
            vector = vector[: options.dimensions]
        if options.normalize:
            vector = vector / max(float(np.linalg.norm(vector)), SMALLEST_NORM)
        return np.ascontiguousarray(vector, dtype=np.float32)

    def _score(self, output: np.ndarray, length: int, options: Any) -> np.ndarray:
        import numpy as np

        if self._answer_rows is not None:
            yes, no = self._answer_rows @ output[length - 1]
            score = float(yes - no)
        else:
            # Of two outputs the second one is for texts that are relevant.
            score = float(output[-1])
        if options.activation != "none":
            score = 1.0 / (1.0 + float(np.exp(-np.clip(score, -80, 80))))
        return np.asarray([score], dtype=np.float32)


def pool(hidden: np.ndarray, pooling: str | None) -> np.ndarray:
    """Return one vector for the hidden states of [tokens, hidden]."""
    if pooling == "cls":
        vector: np.ndarray = hidden[0]
    elif pooling == "last_token":
        vector = hidden[-1]
    else:
        vector = hidden.max(0) if pooling == "max" else hidden.mean(0)
    return vector


def _tokenizer_of(folder: Path, model: LocalModel) -> RustTokenizer:
    found = RustTokenizer.of_folder(folder)
    if found is None and model.backend == "torch":
        from prefect_huggingface.tasks.engines.torch_loading import load_tokenizer

        backend = getattr(load_tokenizer(folder, model), "backend_tokenizer", None)
        found = None if backend is None else RustTokenizer(backend)
    if found is None:
        raise EngineError(
            f"The model in {str(folder)!r} has no fast tokenizer (`tokenizer.json`) that can be read, which vectors "
            "and scores need. Download it again, or use another model."
        )
    return found


def _answer_rows(folder: Path, inputs: EmbeddingInputs) -> np.ndarray:
    try:
        rows: np.ndarray = read_answer_rows(folder, list(inputs.answer_ids))
    except RuntimeError as exc:
        raise EngineError(str(exc)) from exc
    return rows
