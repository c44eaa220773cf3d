"""What the plan lets through is found in the child: missing weights, and attention that the engine does not know."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from prefect_huggingface.blocks import LocalModel, ModelStore
from prefect_huggingface.tasks.errors import ExportError, ExportOutOfMemoryError
from prefect_huggingface.tasks.storage.exports import child
from prefect_huggingface.tasks.storage.exports.child import ChildProgram, child_environment, run_child, run_export
from prefect_huggingface.tasks.storage.exports.exporter import (
    EXACT_PROPERTIES,
    LARGEST_GAP,
    attention_window,
    check_gap,
    checked_tokens,
    load_plainly,
)
from prefect_huggingface.tasks.storage.exports.recipes import resolve_recipe
from prefect_huggingface.tasks.storage.exports.store import get_export
from prefect_huggingface.tasks.storage.snapshots import get_snapshot
from support.export_models import SPECIAL, make_model
from support.tiny_models import make_tiny_llama, make_tokenizer, save_with_spread_weights

SECRETS = {
    "DATABASE_URL": "postgresql://user:pass-word@host/base", "HTTPS_PROXY": "http://user:pass-word@proxy:3128",
    "http_proxy": "http://user:pass-word@proxy:3128", "AWS_SECRET_ACCESS_KEY": "pass-word", "MY_OWN": "pass-word",
    "HF_TOKEN": "hf_pass-word", "PREFECT_API_KEY": "pass-word", "SLACK_WEBHOOK": "https://hooks/pass-word",
}  # fmt: skip
SPY = """
import json, os, sys
from pathlib import Path
environ = Path('/proc/self/environ')
text = environ.read_text() if environ.exists() else str(dict(os.environ))
print('@@export@@ ' + json.dumps({'step': 'done', 'environ': text}), flush=True)
"""


def test_no_secret_of_the_user_is_in_the_environment_of_a_child(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "spy.py").write_text(SPY)
    found = run_child(ChildProgram(tmp_path / "spy.py", "look around", {}), {}, tmp_path)
    assert "pass-word" not in found["environ"]
    assert "PATH=" in found["environ"]


def test_only_a_child_with_a_network_gets_the_proxies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:3128")
    assert "HTTPS_PROXY" not in child_environment(tmp_path)
    assert child_environment(tmp_path, network=True)["HTTPS_PROXY"] == "http://proxy:3128"


@pytest.mark.skipif(os.name == "nt", reason="files are handed on as POSIX does")
def test_a_process_that_cannot_be_started_is_no_fault_of_the_store(tmp_path: Path) -> None:
    (tmp_path / "spy.py").write_text(SPY)
    program = ChildProgram(tmp_path / "spy.py", "export of 'x'", {})
    with pytest.raises(ExportError, match="'x' cannot be started: Bad file descriptor"):
        run_child(program, {}, tmp_path, descriptor=10**6)
    error = child._not_started(program, OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)))
    assert isinstance(error, ExportOutOfMemoryError)
    assert "no memory for another process" in error.message


def test_the_checked_text_is_longer_than_the_window_and_fits_the_model() -> None:
    assert attention_window({"sliding_window": 200}) == 200
    assert attention_window({"window_size": 256}) == 256
    assert attention_window({"sliding_window": 200, "use_sliding_window": False}) == 0
    assert attention_window({"sliding_window": None}) == 0
    assert len(checked_tokens({"vocab_size": 100}, 400)) == 400
    assert len(checked_tokens({"vocab_size": 100, "max_position_embeddings": 32}, 400)) == 28
    assert all(8 <= token < 100 for token in checked_tokens({"vocab_size": 100}, 500))


@pytest.mark.parametrize("gap", [LARGEST_GAP * 2, float("nan")])
def test_a_gap_between_engine_and_model_is_refused(gap: float) -> None:
    check_gap(LARGEST_GAP / 2, LARGEST_GAP)
    with pytest.raises(RuntimeError, match="Use `backend='torch'`"):
        check_gap(gap, LARGEST_GAP)


def test_rounding_alone_makes_no_gap(tmp_path: Path) -> None:
    """Processors with products of 8-bit integers round activations of wide layers, too, unless they are told not to."""
    source = make_tiny_llama(tmp_path, hidden_size=512, layers=4)
    folder = get_export(LocalModel(model_id=str(source), weight_format="int8")).path
    model, engine = load_plainly(str(folder), "CPU", EXACT_PROPERTIES)
    text = checked_tokens({"vocab_size": 400}, 64)
    own, (found,) = model.log_probabilities(text), engine.log_probabilities([text])
    assert max(abs(a - b) for a, b in zip(own, found, strict=True)) < LARGEST_GAP / 100


def make_checkpoint(folder: Path, name: str, **settings: object) -> Path:
    import torch
    import transformers

    folder.mkdir()
    config = getattr(transformers, f"{name}Config")(vocab_size=make_tokenizer(folder), **SPECIAL, **settings)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    return save_with_spread_weights(model, folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("GPTNeo", {
            "hidden_size": 64, "num_layers": 2, "num_heads": 4, "attention_types": [[["local"], 2]], "window_size": 16,
        }),
        ("GPTNeo", {
            "hidden_size": 64, "num_layers": 2, "num_heads": 4, "attention_types": [[["local"], 2]],
            "window_size": 1200,
        }),
        ("Mpt", {"d_model": 64, "n_layers": 2, "n_heads": 4}),
    ],
)  # fmt: skip
def test_attention_that_the_engine_does_not_know_is_never_published(tmp_path: Path, name: str, settings: dict) -> None:  # type: ignore[type-arg]
    folder = make_checkpoint(tmp_path / "model", name, **settings)
    model = LocalModel(model_id=str(folder), weight_format="fp32", store=ModelStore(path=tmp_path / "store"))
    work = tmp_path / "a" / "b" / "work"
    work.mkdir(parents=True)
    with pytest.raises(ExportError, match="The continuous batch of OpenVINO gives other probabilities"):
        run_export(get_snapshot(model), resolve_recipe(model, None), work, -1)


@pytest.mark.slow
def test_a_window_larger_than_a_short_check_is_looked_beyond(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "mistral", sliding_window=1200, max_position_embeddings=2048)
    export = get_export(
        LocalModel(model_id=str(folder), weight_format="fp32", store=ModelStore(path=tmp_path / "store"))
    )
    assert export.key


@pytest.mark.slow
def test_a_checkpoint_without_a_head_is_never_published(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    settings = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    folder = make_checkpoint(tmp_path / "model", "Llama", tie_word_embeddings=False, **settings)
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    model = LocalModel(model_id=str(folder), weight_format="fp32", store=ModelStore(path=tmp_path / "store"))
    work = tmp_path / "a" / "b" / "work"
    work.mkdir(parents=True)
    with pytest.raises(ExportError, match=r"lacks weights of the model: lm_head\.weight"):
        run_export(get_snapshot(model), resolve_recipe(model, None), work, -1)
