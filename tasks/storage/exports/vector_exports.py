"""What exports of models for vectors and scores need beside those of models that generate.

The child process that exports imports this file, and it imports nothing of the package, as the exporter itself.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

VECTOR_EXPORTS = ("feature-extraction", "text-classification")
# Files and folders of Sentence Transformers, which say how vectors are made of what the model gives.
SENTENCE_FILES = re.compile(r"modules\.json|config_sentence_transformers\.json|sentence_[\w-]+_config\.json")
MODULE_FOLDERS = re.compile(r"\d+_[A-Za-z]+")
# Rows of the output layer of a causal reranker for its two answers, float32 of [2, hidden].
ANSWER_ROWS = "answer_rows.npy"
ANSWERS = ("yes", "no")
# Encoders that optimum-intel 2.1 does not know and that it converts rightly with the settings of another one; the tests
# compare each of them with its source.
MORE_ENCODERS = {"modernbert": "DistilBertOpenVINOConfig"}


def is_causal(config: Mapping[str, Any]) -> bool:
    """Return whether a checkpoint is a language model."""
    return any(str(name).endswith("ForCausalLM") for name in config.get("architectures") or [])


def optimum_arguments(source: str, task: str) -> dict[str, Any]:
    """Return the arguments of Optimum's export that depend on the checkpoint.

    A reranker that is a language model gives the probability of one next token, so that its inner model is enough: the
    output layer for all words and all tokens would cost more memory than everything else.
    """
    if task not in VECTOR_EXPORTS:
        return {"task": task}
    config = json.loads((Path(source) / "config.json").read_text(encoding="utf-8"))
    if is_causal(config):
        task = "feature-extraction"
    found: dict[str, Any] = {"task": task}
    name = MORE_ENCODERS.get(config.get("model_type", ""))
    if name is not None:
        from optimum.exporters.openvino import convert, model_configs
        from transformers import AutoConfig

        kept = set(convert.ONNX_SUPPORTED_ARCHITECTURES) - {config["model_type"]}
        convert.ONNX_SUPPORTED_ARCHITECTURES = type(convert.ONNX_SUPPORTED_ARCHITECTURES)(kept)
        settings = getattr(model_configs, name)(AutoConfig.from_pretrained(source, local_files_only=True), task=task)
        found["custom_export_configs"] = {"model": settings}
    return found


def add_files(source: str, output: Path, task: str) -> None:
    """Put into an export what its vectors or scores are made by."""
    folder = Path(source)
    for path in folder.iterdir():
        if path.is_file() and SENTENCE_FILES.fullmatch(path.name):
            shutil.copyfile(path, output / path.name)
        elif path.is_dir() and MODULE_FOLDERS.fullmatch(path.name):
            (output / path.name).mkdir(exist_ok=True)
            for name in ("config.json", "model.safetensors"):
                if (path / name).is_file():
                    shutil.copyfile(path / name, output / path.name / name)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if task == "text-classification" and is_causal(config):
        import numpy as np
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(output / "tokenizer.json"))
        np.save(output / ANSWER_ROWS, read_answer_rows(folder, [tokenizer.token_to_id(answer) for answer in ANSWERS]))


def read_answer_rows(folder: Path, token_ids: list[int | None]) -> Any:
    """Return the rows of the output layer for some tokens, float32 of [tokens, hidden].

    An export has them in a file; a checkpoint has them among its weights, tied to the input layer or not.

    Raises:
        RuntimeError: If they are not there.
    """
    import numpy as np

    if (folder / ANSWER_ROWS).is_file():
        return np.load(folder / ANSWER_ROWS)
    if None in token_ids:
        raise RuntimeError(f"The tokenizer in {str(folder)!r} has no token for 'yes' or 'no'. Use a reranker.")
    from safetensors import safe_open

    for wanted in ("lm_head.weight", "model.embed_tokens.weight", "embed_tokens.weight"):
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as weights:  # type: ignore[no-untyped-call]
                if wanted in list(weights.keys()):
                    rows = weights.get_slice(wanted)
                    found = [rows[token : token + 1] for token in token_ids if token is not None]
                    return np.stack([row[0].float().numpy() for row in found])
    raise RuntimeError(f"The model in {str(folder)!r} has no output layer in its safetensors. Use another model.")


def verify_vectors(output: Path) -> None:
    """Compute something with an export.

    Raises:
        RuntimeError: If the model gives no finite numbers.
    """
    import numpy as np
    import openvino

    model = openvino.Core().compile_model(output / "openvino_model.xml", "CPU")
    ids = np.ones((1, 4), dtype=np.int64)
    given = {"input_ids": ids, "attention_mask": ids, "token_type_ids": ids * 0, "position_ids": np.arange(4)[None]}
    names = [port.get_any_name() for port in model.inputs]
    found = model({name: given[name] for name in names})[0]
    if not np.isfinite(found).all():
        raise RuntimeError("The export gives no finite numbers.")
