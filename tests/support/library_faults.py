"""Makes the libraries under the engines fail, as they do on a machine that is short of memory or has a broken model."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest

# The classes whose `forward` computes a step.
MODEL_CLASSES = {
    "torch-text": ("transformers", "LlamaForCausalLM"),
    "torch-seq2seq": ("transformers", "T5ForConditionalGeneration"),
    "torch-images": ("transformers", "LlavaForConditionalGeneration"),
    "openvino-seq2seq": ("optimum.intel", "OVModelForSeq2SeqLM"),
}


class FailingForward:
    """Makes steps of a model class of Transformers or Optimum fail.

    Attributes:
        calls: Number of sequences of each step so far.
    """

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, family: str, must_fail: Callable[[int, int], bool], error: BaseException,
        longest: float = float("inf"),
    ) -> None:  # fmt: skip
        """Put the fault in.

        Args:
            monkeypatch: Takes it out again.
            family: Name of the family.
            must_fail: Says by the number of the step and its number of sequences whether it fails.
            error: What is raised.
            longest: Number of tokens above which a prompt makes a step fail.
        """
        module, name = MODEL_CLASSES[family]
        model_class = getattr(import_module(module), name)
        real = model_class.forward
        self.calls: list[int] = []

        def forward(model: Any, *args: Any, **kwargs: Any) -> Any:
            ids = kwargs.get("decoder_input_ids")
            ids = kwargs.get("input_ids") if ids is None else ids
            self.calls.append(len(ids if ids is not None else args[0]))
            encoded = kwargs.get("encoder_outputs")
            seen = kwargs.get("attention_mask") if encoded is None else encoded[0][..., 0]
            if must_fail(len(self.calls), self.calls[-1]) or (seen is not None and seen.shape[-1] > longest):
                raise error
            return real(model, *args, **kwargs)

        # Transformers reads the signature to know which arguments a model takes.
        forward.__wrapped__ = real  # type: ignore[attr-defined]
        forward.__signature__ = inspect.signature(real)  # type: ignore[attr-defined]
        monkeypatch.setattr(model_class, "forward", forward)


def out_of_memory() -> RuntimeError:
    """Return the error of torch on a CPU whose memory ran out."""
    return RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory")


class FailingGenai:
    """Makes steps and loads of OpenVINO GenAI fail.

    Attributes:
        steps: Number of steps so far.
        loads: Number of loads so far.
        fail_step: Says by the number of the step whether it fails.
        fail_load: Says by the number of the load whether it fails.
    """

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        fail_step: Callable[[int], bool] = lambda step: False,
        fail_load: Callable[[int], bool] = lambda load: False,
    ) -> None:
        import openvino_genai

        self.steps = self.loads = 0
        self.fail_step, self.fail_load = fail_step, fail_load
        faults, real, lock = self, openvino_genai.ContinuousBatchingPipeline, threading.Lock()

        class Pipeline:
            """The pipeline of GenAI with faults."""

            def __init__(self, *args: Any, **kwargs: Any) -> None:
                with lock:
                    faults.loads += 1
                if faults.fail_load(faults.loads):
                    raise RuntimeError("the model cannot be read: the disk is gone")
                self._real = real(*args, **kwargs)

            def step(self) -> None:
                with lock:
                    faults.steps += 1
                if faults.fail_step(faults.steps):
                    raise RuntimeError("the device is lost")
                self._real.step()

            def __getattr__(self, name: str) -> Any:
                return getattr(self._real, name)

        monkeypatch.setattr(openvino_genai, "ContinuousBatchingPipeline", Pipeline)
