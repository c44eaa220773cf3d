"""The examples of all pages run, their commands and links exist, and the first page stays one page."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from support.hub_server import LocalHub
from support.ports import free_port
from support.prefect_services import stop_process, wait_until

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / name for name in ("README.md", "CONTRIBUTING.md", "deployments/README.md", "tests/benchmarks/README.md")
]
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
SERVER = re.compile(r"http://127\.0\.0\.1:8000")


def blocks_of(language: str) -> list[Any]:
    """The code blocks of one language in all pages, each with its page."""
    found = [(page, code) for page in PAGES for code in re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.S)]
    return [pytest.param(code, id=f"{page.relative_to(ROOT)}-{number}") for number, (page, code) in enumerate(found)]


EXAMPLES = [
    pytest.param(page, re.findall(r"```python\n(.*?)```", page.read_text(), re.S), id=str(page.relative_to(ROOT)))
    for page in PAGES
]
# Runs the examples of a page one after the other, each in a folder of its own and with nothing of those before it.
RUNNER = """
import os, sys
from pathlib import Path
for script in map(Path, sys.argv[1:]):
    os.chdir(script.parent)
    exec(compile(script.read_text(), script.name, "exec"), {"__name__": "__main__"})
    print("@@end@@", flush=True)
"""


@pytest.fixture(scope="module")
def hub_address(bundled_model: Path) -> Iterator[str]:
    """A Hub that has the bundled model under the name of the one in the examples."""
    with LocalHub() as hub:
        hub.create(SMOLLM2, {path.name: path for path in bundled_model.iterdir() if path.is_file()})
        yield hub.endpoint


@pytest.fixture(scope="module")
def model_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A model server as the pages start it, on another port."""
    port, log = free_port(), tmp_path_factory.mktemp("server") / "log"
    command = [sys.executable, "-m", "prefect_huggingface.deployments.model_server", "--model"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "deployments/quickstart/model", "--port", str(port)],
            cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def is_ready() -> bool:
        assert process.poll() is None, log.read_text()
        with suppress(httpx.TransportError):
            return httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
        return False

    try:
        wait_until(is_ready, 120, "the model server")
        yield f"http://127.0.0.1:{port}"
    finally:
        stop_process(process)


def write_example(folder: Path, code: str) -> Path:
    """Write an example into a folder that looks like a clone, and return its file."""
    folder.mkdir()
    (folder / "deployments").symlink_to(ROOT / "deployments")
    questions = (ROOT / "deployments" / "quickstart" / "questions.jsonl").read_text().splitlines(keepends=True)
    (folder / "questions.jsonl").write_text("".join(questions[:20]))
    script = folder / "example.py"
    script.write_text(code)
    return script


@pytest.mark.timeout(900)
@pytest.mark.usefixtures("prefect_server")
@pytest.mark.parametrize(("page", "codes"), [example for example in EXAMPLES if example.values[1]])
def test_the_examples_of_a_page_run(
    page: Path, codes: list[str], hub_address: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    from prefect.settings import PREFECT_API_URL

    if any(SERVER.search(code) for code in codes):
        codes = [SERVER.sub(request.getfixturevalue("model_server"), code) for code in codes]
    scripts = [write_example(tmp_path / str(number), code) for number, code in enumerate(codes)]
    environment = {
        "PREFECT_API_URL": PREFECT_API_URL.value(), "PREFECT_LOGGING_LEVEL": "WARNING", "HF_ENDPOINT": hub_address,
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, *map(str, scripts)],
        cwd=tmp_path,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    for code, printed in zip(codes, done.stdout.split("@@end@@\n")[:-1], strict=True):
        assert "capital of Peru" not in code or "Lima" in printed
        for expected in re.findall(r"print\(.*\)  # (.*)", code):
            assert expected in printed


def test_the_examples_are_there() -> None:
    counts = {str(example.id): len(example.values[1]) for example in EXAMPLES}
    assert counts["README.md"] >= 4
    assert counts["deployments/README.md"] >= 2


@pytest.mark.parametrize("code", blocks_of("bash"))
def test_a_command_exists(code: str) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for line in code.replace("\\\n", " ").splitlines():
        words = line.split("#")[0].split()
        if words[:1] == ["make"]:
            for target in (word for word in words[1:] if "=" not in word):
                assert re.search(rf"^{target}:", makefile, re.MULTILINE), line
        elif words[:2] == ["python", "-m"]:  # other tests run these programs
            program = find_spec(words[2])
            assert program is not None, line
            source = Path(str(program.origin))
            source = source.with_name("__main__.py") if program.submodule_search_locations else source
            assert all(word in source.read_text() for word in words[3:] if word.startswith("--")), line
        elif words[:1] == ["python"]:
            assert (ROOT / words[1]).is_file(), line
        elif words:
            assert words[0] in ("pip", "curl") or shutil.which(words[0], path=str(Path(sys.executable).parent)), line


@pytest.mark.parametrize("code", blocks_of("yaml"))
def test_yaml_can_be_read(code: str) -> None:
    assert yaml.safe_load(code)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_names_of_files_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\((?!https?://)([^)#]+)[^)]*\)", text):
        assert (page.parent / target).exists(), target
    for name in re.findall(r"`((?:blocks|tasks|flows|deployments|tests)/[\w/.-]+\.(?:py|yaml|jsonl|png))`", text):
        assert (ROOT / name).exists(), name


def test_the_first_page_is_one_page() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 170
    assert all(len(line) <= 120 or line.startswith("|") or "](http" in line for line in lines)


def test_every_public_name_is_in_the_tables() -> None:
    from prefect import Flow, Task
    from prefect.blocks.core import Block

    import prefect_huggingface.blocks
    import prefect_huggingface.flows
    import prefect_huggingface.tasks

    text = (ROOT / "README.md").read_text()
    for module in (prefect_huggingface.blocks, prefect_huggingface.tasks, prefect_huggingface.flows):
        for name in module.__all__:
            value = getattr(module, name)
            public = isinstance(value, (Flow, Task)) or (isinstance(value, type) and issubclass(value, Block))
            assert not public or f"`{name}`" in text, name
