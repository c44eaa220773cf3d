"""Inputs and outputs on the Hub (`hf://datasets/...`) are read and written with the token of the block alone."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from prefect_huggingface.blocks import HuggingFaceCredentials, LocalModel
from prefect_huggingface.flows import batch_inference
from prefect_huggingface.tasks.errors import HuggingFaceTaskError, TableError
from prefect_huggingface.tasks.storage.journals.journal import Journal
from prefect_huggingface.tasks.storage.journals.ownership import hold_journal
from prefect_huggingface.tasks.storage.places import Place, reach_hub

pytestmark = pytest.mark.usefixtures("prefect_server")

TOKEN, AMBIENT = "hf_TokenOfTheBlock", "hf_TokenOfTheMachine"
SOURCE, DESTINATION = "hf://datasets/org/questions/in.jsonl", "hf://datasets/org/answers/out.jsonl"
ROWS = [{"id": number, "country": name} for number, name in enumerate(("France", "Spain", "Peru"))]
PROMPT = "What is the capital of {country}?"


@pytest.fixture
def data(hub, monkeypatch):
    """A Hub with a private data set to read and one to write, on a machine that has a token for another Hub."""
    hub.users[TOKEN] = "me"
    rows = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    hub.create("datasets/org/questions", {"in.jsonl": rows}, private=True, readers={"me"})
    hub.create("datasets/org/answers", {"README.md": b"Answers"}, private=True, readers={"me"}, writers={"me"})
    monkeypatch.setenv("HF_TOKEN", AMBIENT)
    return hub


def test_batches_of_two_threads_keep_their_own_hubs(data):
    both, first_ended = threading.Barrier(2), threading.Event()

    def look(token: str, waits: bool) -> list[bool]:
        with reach_hub(data.endpoint, token):
            both.wait(30)
            found = [Place(SOURCE).exists()]
            assert not waits or first_ended.wait(30)
            found.append(Place(SOURCE).exists())
        first_ended.set()
        return found

    with ThreadPoolExecutor(2) as pool:
        foreign, own = (pool.submit(look, token, waits) for token, waits in ((AMBIENT, False), (TOKEN, True)))
        assert (foreign.result(60), own.result(60)) == ([False, False], [True, True])


def model_of(hub, folder: Path, token: str | None) -> LocalModel:
    credentials = HuggingFaceCredentials(token=token, endpoint=hub.endpoint)
    return LocalModel(model_id=str(folder), backend="torch", credentials=credentials, options={"max_new_tokens": 4})


def test_rows_are_read_from_the_hub_with_the_token_of_the_block(data, tiny_llama, tmp_path):
    model, destination = model_of(data, tiny_llama, TOKEN), tmp_path / "out.jsonl"
    summary = batch_inference(model, SOURCE, str(destination), PROMPT, show_progress=False)
    assert summary.succeeded == len(ROWS)
    assert [json.loads(line)["country"] for line in destination.read_text().splitlines()] == [
        row["country"] for row in ROWS
    ]
    assert {entry.token for entry in data.journal.requests} == {TOKEN}


def test_answers_are_written_to_the_hub_with_the_token_of_the_block(data, tiny_llama, tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    summary = batch_inference(model_of(data, tiny_llama, TOKEN), str(source), DESTINATION, PROMPT, show_progress=False)
    assert (summary.succeeded, summary.destination) == (len(ROWS), DESTINATION)
    repository = data.repositories["datasets/org/answers"]
    files = repository.commits[repository.references["main"]]
    assert [json.loads(line)["id"] for line in files["out.jsonl"].content.splitlines()] == [0, 1, 2]
    assert sorted(files) == ["README.md", "out.jsonl"]
    assert {entry.token for entry in data.journal.requests} == {TOKEN}
    # A commit is for ever, and the Hub takes few in an hour: one for the repository as it was, and one for the answers.
    assert len(repository.commits) == 2


def test_what_came_to_the_hub_meanwhile_is_not_replaced(data):
    repository = data.repositories["datasets/org/answers"]
    with reach_hub(data.endpoint, TOKEN):
        place = Place.of(DESTINATION)
        assert not place.exists()
        with pytest.raises(TableError, match="exists already"), place.published() as temporary:
            temporary.write_bytes(b"ours")
            repository.commit({"out.jsonl": b"theirs"})
    assert repository.commits[repository.references["main"]]["out.jsonl"].content == b"theirs"


def test_one_output_has_one_journal_on_this_machine():
    journal = Journal.beside(DESTINATION).place
    assert journal.is_local
    assert Journal.beside(DESTINATION.replace("answers/", "answers@main/")).place == journal
    assert Journal.beside(DESTINATION.replace("answers/", "answers@other/")).place != journal
    assert not Journal.beside("hf://buckets/org/answers/out.jsonl").place.is_local


def test_batches_of_other_dates_are_found(data, tiny_llama, tmp_path, caplog):
    model, template = model_of(data, tiny_llama, TOKEN), DESTINATION.replace("out", "out-{date}")
    left = Journal.beside(template.format(date="2026-01-02"))
    with hold_journal(left) as owner:
        owner.write("job", {"key": "1"})
    batch_inference(model, SOURCE, template, PROMPT, show_progress=False)
    assert "out-2026-01-02.jsonl' was left unfinished" in caplog.text
    assert {entry.token for entry in data.journal.requests} == {TOKEN}


@pytest.mark.parametrize("token", [None, "hf_AnotherToken"])
def test_no_other_token_is_tried(data, tiny_llama, tmp_path, token):
    model = model_of(data, tiny_llama, token)
    with pytest.raises(HuggingFaceTaskError, match="org/questions"):
        batch_inference(model, SOURCE, str(tmp_path / "out.jsonl"), PROMPT, show_progress=False)
    assert AMBIENT not in {entry.token for entry in data.journal.requests}
    assert not (tmp_path / "out.jsonl").exists()
