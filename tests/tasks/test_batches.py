"""What cannot work is refused before anything expensive, with the value and the remedy; nothing is overwritten."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from prefect_huggingface.blocks import GenerationOptions, LocalModel
from prefect_huggingface.tasks.batches import check_batch
from prefect_huggingface.tasks.batching.job import BatchOptions, add_models, resolve_model
from prefect_huggingface.tasks.batching.output import check_free
from prefect_huggingface.tasks.batching.run import Progress, check_failures
from prefect_huggingface.tasks.errors import BatchError, HuggingFaceTaskError, ModelSourceError, TableError
from prefect_huggingface.tasks.storage.journals import ownership
from prefect_huggingface.tasks.storage.journals.journal import Journal
from prefect_huggingface.tasks.storage.journals.ownership import hold_journal, is_held
from prefect_huggingface.tasks.storage.tables.inputs import read_chunks

# A model that is not there: whatever is refused before it is looked at costs nothing.
NO_MODEL = LocalModel(model_id="/no/such/model", backend="torch")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_text('{"country": "Peru", "id": 1, "status": "x"}\n{"country": "Chile", "id": 1}\n')
    return path


def check(source: Path | str, destination: Path | str, prompt: str | None = "{country}", **settings: Any) -> None:
    own = {name: settings.pop(name) for name in ("system", "rows") if name in settings}
    check_batch(NO_MODEL, str(source), str(destination), prompt, **own, more=BatchOptions(**settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": "{town}"}, r"no column 'town'. Its columns are 'country', 'id', 'status'"),
        ({"prompt": "{country"}, "must be a template"),
        ({"prompt": None}, "say nothing to ask"),
        ({"messages_column": "country"}, "Only one of"),
        ({"system": "{tone}"}, "no column 'tone'"),
        ({"option_columns": ["speed"]}, "must be named as generation options, got .'speed'."),
        ({"option_columns": ["seed"]}, "no column 'seed'"),
        ({"columns": ["town"]}, "names .'town'."),
        ({}, "has columns .'status'. that the output adds. Set `output_prefix`"),
        ({"columns": ["country"], "id_column": "id"}, r"occur twice: line 2 \(1\)"),
        ({"columns": ["country"], "id_column": "key"}, "'key' is not in the input"),
    ],
)
def test_settings_that_do_not_fit_the_table(
    tmp_path: Path, source: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(BatchError, match=message):
        check(source, tmp_path / "out.csv", **settings)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl"]


@pytest.mark.parametrize("format", ["jsonl", "openai"])
@pytest.mark.parametrize("in_step", [True, False])
def test_options_that_clash_are_found_in_the_plan(tmp_path: Path, source: Path, format: str, in_step: bool) -> None:
    model = NO_MODEL.model_copy(update={"options": GenerationOptions(num_beams=4)})
    more, prompt, options = BatchOptions(columns=["country"]), "{country}", GenerationOptions(do_sample=True)
    if format == "openai":
        source.write_text(json.dumps({"custom_id": "a", "url": "/v1/completions", "body": {"prompt": "x"}}) + "\n")
        more, prompt = BatchOptions(), None  # type: ignore[assignment]
    elif in_step:
        step = {"name": "a", "prompt": prompt, "options": options}
        more, prompt, options = BatchOptions(columns=["country"], steps=[step]), None, None  # type: ignore[assignment]
    with pytest.raises(BatchError, match="'/no/such/model'.*Option 'num_beams': .*must be 1 with `do_sample=True`"):
        check_batch(model, str(source), str(tmp_path / "out.jsonl"), prompt, options, more=more)


def test_a_column_of_temperatures_goes_with_a_model_that_samples(tmp_path: Path) -> None:
    source = tmp_path / "in.csv"
    source.write_text("country,temperature\nPeru,0.5\nChile,\n")
    model = NO_MODEL.model_copy(update={"options": GenerationOptions(do_sample=True, top_p=0.9)})
    more = BatchOptions(option_columns=["temperature"])
    job = check_batch(model, str(source), str(tmp_path / "out.csv"), "{country}", more=more).job
    make, (chunk,) = job.make_requests(), read_chunks(job.table)
    made = [make(number, row) for number, row in enumerate(chunk.rows)]
    merged = [model.options.merged(each.request.options) for each in made]
    assert [(each.do_sample, each.temperature, each.top_p) for each in merged] == [(True, 0.5, 0.9), (True, None, 0.9)]
    assert not any(each.shareable for each in made)


@pytest.mark.parametrize("prefix", ["", "new_"])
def test_a_plan_changes_nothing_and_leaves_the_model_alone(tmp_path: Path, source: Path, prefix: str) -> None:
    check(source, tmp_path / "out.csv", output_prefix=prefix, columns=None if prefix else ["country"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl"]
    with pytest.raises(ModelSourceError, match="/no/such/model"):
        resolve_model(NO_MODEL)


@pytest.mark.parametrize(
    ("name", "message"),
    [("in.jsonl/deeper/out.csv", "in.jsonl' is not a folder"), (f"{'n' * 240}.csv", "its name has 244 characters")],
)
def test_a_destination_that_cannot_be_written_is_found_in_the_plan(
    tmp_path: Path, source: Path, name: str, message: str
) -> None:
    with pytest.raises(BatchError, match=message):
        check(source, tmp_path / name, columns=["country"])


def test_a_full_disk_is_found_in_the_plan(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2_000_000))
    with pytest.raises(BatchError, match=r"the disk has 2.0 MB left"):
        check(source, tmp_path / "out.csv", columns=["country"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rows/out.jsonl", "is within the input"),
        ("rows/deeper/out.jsonl", "is within the input"),
        ("out.txt", "format of 'out.txt' is not known"),
        ("out.csv.gz", "must not be compressed"),
        ("folder.csv", "must be a file"),
    ],
)
def test_places_where_no_output_goes(tmp_path: Path, name: str, message: str) -> None:
    rows = tmp_path / "rows"
    rows.mkdir()
    (rows / "in.jsonl").write_text('{"country": "Peru"}\n')
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(HuggingFaceTaskError, match=message):
        check(rows, tmp_path / name)


def test_an_output_that_the_pattern_of_the_input_would_find(tmp_path: Path, source: Path) -> None:
    with pytest.raises(BatchError, match="is within the input"):
        check(tmp_path / "*.jsonl", tmp_path / "out.jsonl")
    with pytest.raises(BatchError, match="is within the input"):
        check(source, source)


@pytest.mark.parametrize("pattern", ["*.errors.jsonl", "out.errors.jsonl"])
def test_the_errors_of_requests_do_not_become_input(tmp_path: Path, pattern: str) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}]}
    request = {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": body}
    (tmp_path / "out.errors.jsonl").write_text(json.dumps(request) + "\n")
    with pytest.raises(BatchError, match=r"out\.errors\.jsonl' is within the input"):
        check(tmp_path / pattern, tmp_path / "out.jsonl", None)


def test_what_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "torn.parquet").write_bytes(b"PAR1")
    for name in ("empty.csv", "torn.parquet", "none.csv"):
        with pytest.raises(TableError, match=name):
            check(tmp_path / name, tmp_path / "out.csv")


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    for name in ("file.csv", "link.csv"):
        path = tmp_path / name
        path.symlink_to("nowhere") if "link" in name else path.write_text("mine")
        with pytest.raises(BatchError, match="exists already"):
            check_free(str(path))


def test_too_many_failures_as_a_number_or_a_share() -> None:
    def progress(failed: int, finished: int = 1000, invalid: int = 0) -> Progress:
        return Progress(1000, finished, 0, failed, 0, 1.0, 1.0, 1.0, invalid)

    check_failures(progress(1000), None)
    check_failures(progress(5), 5)
    check_failures(progress(100), 0.1)
    check_failures(progress(40, 49), 0.1)  # too early for a share
    for failed, finished, limit in ((6, 1000, 5), (6, 7, 5), (101, 1000, 0.1), (6, 50, 0.1)):
        with pytest.raises(BatchError, match="retry_failed=True"):
            check_failures(progress(failed, finished), limit)

    check_failures(progress(30, 100, 10), None, min_valid=0.87)  # 10 of 80 answers
    with pytest.raises(BatchError, match="10 of 80 answers"):
        check_failures(progress(30, 100, 10), None, min_valid=0.9)
    check_failures(progress(10, 49, 10), None, min_valid=0.9)


HOLDER = """
import sys, time
from prefect_huggingface.tasks.storage.journals.ownership import hold_journal
from prefect_huggingface.tasks.storage.journals.journal import Journal
with hold_journal(Journal.beside(sys.argv[1]), "refuse"):
    print("holding", flush=True)
    time.sleep(60)
"""


def test_two_runs_at_once_are_refused_or_wait(tmp_path: Path) -> None:
    destination = str(tmp_path / "out.csv")
    process = subprocess.Popen([sys.executable, "-c", HOLDER, destination], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"holding\n"
    with (
        pytest.raises(BatchError, match="Another run is already writing"),
        hold_journal(Journal.beside(destination), "refuse"),
    ):
        pass
    assert is_held(Journal.beside(destination))
    process.kill()  # the lock ends with its process
    process.wait()
    process.stdout.close()
    with hold_journal(Journal.beside(destination), "wait"):
        pass
    assert not is_held(Journal.beside(destination))


def test_leases_on_other_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "POLL_SECONDS", 0.1)
    monkeypatch.setattr(ownership, "RENEWAL_SECONDS", 0.1)
    journal = Journal.beside(f"memory://{tmp_path.name}/out.csv")
    assert not is_held(journal)
    with hold_journal(journal):
        assert is_held(journal)
        with pytest.raises(BatchError, match="Another run is already writing"), hold_journal(journal):
            pass
    assert not is_held(journal)


def test_the_plan_names_what_decides_the_text(tmp_path: Path, source: Path, tiny_llama: Path) -> None:
    def key(**changes: Any) -> str:
        model = LocalModel(model_id=str(tiny_llama), backend="torch", **changes.pop("model", {}))
        prompt = changes.pop("prompt", "{country}")
        more = BatchOptions(output_prefix="x", timings=changes.pop("timings", False))
        plan = check_batch(model, str(source), str(tmp_path / "out.csv"), prompt, more=more, **changes)
        return add_models(plan.job, [model], [resolve_model(model)]).key

    first = key()
    assert key(timings=True) == first  # how the output looks is no part of it
    assert key(model={"device": "cpu"}) == first
    others = [
        key(prompt="{country}!"),
        key(system="Hi"),
        key(options=GenerationOptions(max_new_tokens=3)),
        key(model={"dtype": "bfloat16"}),
        key(model={"options": {"max_new_tokens": 3}}),
        key(model={"chat_template": "never"}),
    ]
    source.write_text(json.dumps({"country": "Peru"}) + "\n")
    others.append(key())
    assert len({first, *others}) == len(others) + 1
