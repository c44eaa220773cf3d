"""The networks of the engines for vectors and scores, on OpenVINO and on torch: padded tokens in, hidden states out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from prefect_huggingface.blocks import LocalModel
from prefect_huggingface.tasks.engines.openvino_runtime import choose_device, compile_properties, last_line
from prefect_huggingface.tasks.errors import EngineError

if TYPE_CHECKING:
    import numpy as np

    Arrays = dict[str, np.ndarray]


class Network(Protocol):
    """A loaded model. Only the thread of its engine uses it.

    Attributes:
        slots: How many batches may be under way.
    """

    slots: int

    def start(self, inputs: Arrays) -> Callable[[], np.ndarray]:
        """Start a batch, and return what waits for its first output: hidden states or logits.

        Args:
            inputs: `input_ids`, `attention_mask` and `token_type_ids`, each int64 of [rows, tokens].
        """
        ...


class OpenVINONetwork:
    """Model of an OpenVINO folder. Batches are computed side by side, one for each stream of the device."""

    def __init__(self, folder: Path, model: LocalModel) -> None:
        """Load the model.

        Raises:
            EngineError: If OpenVINO cannot load it.
        """
        device = choose_device(model)
        properties = {"PERFORMANCE_HINT": "THROUGHPUT", **compile_properties(model)}
        try:
            import openvino

            core = openvino.Core()
            compiled = core.compile_model(core.read_model(folder / "openvino_model.xml"), device, properties)
        except Exception as exc:
            raise EngineError(
                f"OpenVINO cannot load {str(folder)!r} on {device}: {last_line(exc)} "
                "Check the folder, `device` and `ov_config`."
            ) from exc
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
        """Start a batch, and return what waits for its output."""
        import numpy as np

        if "position_ids" in self._names:
            rows, length = inputs["input_ids"].shape
            inputs = {**inputs, "position_ids": np.tile(np.arange(length, dtype=np.int64), (rows, 1))}
        request = self._idle.pop()
        request.start_async({name: value for name, value in inputs.items() if name in self._names})

        def wait() -> np.ndarray:
            try:
                request.wait()
                return np.array(request.get_output_tensor(0).data, dtype=np.float32)
            finally:
                self._idle.append(request)

        return wait


class TorchNetwork:
    """Model of Transformers."""

    slots = 1

    def __init__(self, folder: Path, model: LocalModel, auto_class: str) -> None:
        """Load the model.

        Raises:
            EngineError: If it cannot be loaded.
        """
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


def load_network(folder: Path, model: LocalModel, is_scored: bool) -> Network:
    """Load the model of a folder.

    Args:
        folder: Folder of a checkpoint or an export.
        model: Backend, device and their settings.
        is_scored: Whether the model has a head that gives scores.

    Raises:
        EngineError: If it cannot be loaded.
    """
    if model.backend == "openvino":
        return OpenVINONetwork(folder, model)
    return TorchNetwork(folder, model, "AutoModelForSequenceClassification" if is_scored else "AutoModel")
