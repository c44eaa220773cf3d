"""Keys of assets: accepted by Prefect whatever the path, different for different paths, without secrets."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prefect.assets import Asset

from prefect_huggingface.blocks import HuggingFaceCredentials, InferenceEndpoint, LocalModel
from prefect_huggingface.tasks.assets import model_key, model_keys, note_asset, place_key


@pytest.mark.parametrize(
    ("location", "key"),
    [
        ("/data/in.jsonl", "file:///data/in.jsonl"),
        ("file:///data/in.jsonl", "file:///data/in.jsonl"),
        ("/data/*.jsonl", "file:///data"),
        ("/data/20??/[ab]/x.csv", "file:///data"),
        ("s3://bucket/in/*.parquet", "s3://bucket/in"),
        ("s3://user:secret@bucket/in.csv", "s3://bucket/in.csv"),
        ("https://me:secret@host/in.csv?token=secret", "https://host/in.csv"),
        ("simplecache::s3://bucket/in.csv", "s3://bucket/in.csv"),
        ("memory://in.csv", "memory://in.csv"),
    ],
)
def test_keys_of_places(location: str, key: str) -> None:
    assert place_key(location) == key
    assert Asset(key=key).key == key


@settings(deadline=None)
@given(st.text(st.characters(exclude_characters="/*?["), min_size=1))
def test_every_path_has_a_key(name: str) -> None:
    key = place_key(f"/data/x{name}")
    assert Asset(key=key).key == key
    key.encode()


@settings(deadline=None)
@given(st.lists(st.text("ab %&~_\t|é\udc80", max_size=8), min_size=2, max_size=2, unique=True))
def test_keys_differ_where_paths_do(names: list[str]) -> None:
    assert len({place_key(f"/data/x{name}x") for name in names}) == 2


def test_very_long_paths_keep_their_difference() -> None:
    keys = {place_key("/" + "d" * 600 + end) for end in ("a", "b")}
    assert len(keys) == 2
    assert all(Asset(key=key) for key in keys)


def test_keys_of_models(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    private = HuggingFaceCredentials(token="hf_secret", endpoint="https://hub.example:8443")
    assert model_key(LocalModel(model_id="org/name", revision="main")) == "hf://org/name"
    assert model_key(LocalModel(model_id="org/name", credentials=private)) == "https://hub.example:8443/org/name"
    assert model_key(LocalModel(model_id=str(tmp_path))) == f"file://{tmp_path}"
    assert model_key(InferenceEndpoint(model_id="org/name", provider="auto")) == "hf://org/name"
    assert model_key(InferenceEndpoint(url="http://127.0.0.1:8080/v1")) == "http://127.0.0.1:8080/v1"
    assert model_keys(LocalModel(model_id="org/name"), export="0" * 64) == ("hf://org/name",)


def test_outside_a_task_nothing_is_noted() -> None:
    note_asset("file:///data/out.csv", ["file:///data/in.csv"])
