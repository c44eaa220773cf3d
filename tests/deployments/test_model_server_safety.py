"""What the model server refuses, and that bad clients do not disturb good ones."""

from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import httpx
import pytest

from prefect_huggingface.deployments.model_server.settings import parse_arguments, read_keys
from prefect_huggingface.tasks.openai_protocol import BodyError, read_call
from support.hub_server import LocalHub
from support.model_servers import USER, ModelServerProcess, RawClient, model_server
from support.prefect_services import wait_until

ENDLESS = {"max_tokens": 8000, "ignore_eos": True, "stream": True}


def image_message(url: object) -> list[dict]:
    return [{"role": "user", "content": [{"type": "text", "text": "What?"}, {"type": "image_url", "image_url": url}]}]


def assert_answers(server: ModelServerProcess) -> None:
    began = time.monotonic()
    assert server.chat(max_tokens=2).status_code == 200
    assert time.monotonic() - began < 10


def close_all(server: ModelServerProcess, clients: list[RawClient]) -> None:
    """Close connections in the middle of their streams: every one of their requests ends."""
    for client in clients:
        client.close()
    wait_until(lambda: server.read_metric("vllm:num_requests_running") == 0, 15, "the end of the requests")


@pytest.mark.parametrize("key", [None, "wrong", "key-of-the-tests-5f1", "key-of-the-tests-5f1d,another-key"])
def test_a_wrong_key_is_refused(guarded_server: ModelServerProcess, key: str | None) -> None:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    for path in ("/v1/models", "/metrics"):
        assert httpx.get(f"{guarded_server.origin}{path}", headers=headers).status_code == 401
    answer = httpx.post(f"{guarded_server.url}/chat/completions", headers=headers, json={"messages": USER})
    assert answer.json()["error"]["type"] == "authentication_error"
    assert answer.headers["www-authenticate"] == "Bearer"


def test_each_line_of_the_file_is_a_key(guarded_server: ModelServerProcess) -> None:
    answer = httpx.get(f"{guarded_server.url}/models", headers={"Authorization": "Bearer another-key"})
    assert answer.status_code == 200


def test_the_key_is_in_no_log(guarded_server: ModelServerProcess) -> None:
    guarded_server.chat(max_tokens=2)
    guarded_server.post("/v1/chat/completions", messages="wrong")
    assert guarded_server.key
    assert guarded_server.key not in guarded_server.log.read_text()
    assert guarded_server.key not in " ".join(map(str, guarded_server.process.args))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.1", "some.name"])
def test_another_address_needs_a_key(host: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--api-key-file"):
        read_keys(None, host)
    file = tmp_path / "keys"
    for content in (None, "", " \n", "schl\u00fcssel"):
        if content is not None:
            file.write_text(content, encoding="utf-8")
        with pytest.raises(SystemExit, match="cannot be read|is empty"):
            read_keys(file, host)
    file.write_text("one\n\ntwo\n")
    assert read_keys(file, host) == ("one", "two")
    assert read_keys(None, "127.0.0.1") == read_keys(None, "::1") == read_keys(None, "localhost") == ()


def test_the_command_line_is_checked() -> None:
    for arguments in ([], ["--model", "x", "--memory-gb", "0"], ["--model", "x", "--idle-minutes", "-1"]):
        with pytest.raises(SystemExit):
            parse_arguments(arguments)


def test_a_web_page_cannot_use_a_server_without_a_key(long_model: Path, tmp_path: Path) -> None:
    with model_server(tmp_path, "--model", str(long_model)) as server:
        assert server.post("/v1/chat/completions", messages=USER, max_tokens=2).status_code == 200
        # A page whose name points to this machine, and a form that needs no permission of the server.
        rebound = httpx.get(f"{server.url}/models", headers={"Host": f"evil.example:{server.port}"})
        assert rebound.status_code == 403
        form = httpx.post(f"{server.url}/chat/completions", content=json.dumps({"messages": USER}),
                          headers={"Content-Type": "text/plain"})  # fmt: skip
        assert form.status_code == 415
        assert "access-control-allow-origin" not in form.headers


def test_bodies_are_bounded(guarded_server: ModelServerProcess) -> None:
    assert guarded_server.chat(user="x" * 1_100_000).status_code == 413
    with closing(RawClient(guarded_server)) as client:
        client.send("POST", "/v1/chat/completions", {**guarded_server.headers, "Content-Length": "99999999999"})
        assert b" 413 " in client.read_until(b"\r\n\r\n")
    with closing(RawClient(guarded_server)) as client:  # a body that does not say how long it is
        headers = {**guarded_server.headers, "Transfer-Encoding": "chunked"}
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{lines}\r\n"
        client.socket.sendall(head.encode())
        try:
            for _ in range(40):
                client.socket.sendall(b"10000\r\n" + b"x" * 0x10000 + b"\r\n")
        except OSError:
            pass  # the server does not read on
        else:
            assert b" 413 " in client.read_until(b"\r\n\r\n")
    long = guarded_server.chat(messages=[{"role": "user", "content": "x " * 400_000}])
    assert (long.status_code, long.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert_answers(guarded_server)


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"3", b'"x"', b"\xff\xfe", b'{"messages": 3}', b'{"messages": [3]}', b'{"messages": []}',
        b'{"messages": [{"role": "robot", "content": "x"}]}', b'{"messages": [{"role": "user"}]}', b"[" * 100_000,
        b'{"a": NaN}', b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        json.dumps({"messages": USER, "max_tokens": "many"}).encode(),
        json.dumps({"messages": USER, "tools": [3]}).encode(),
        json.dumps({"messages": USER, "stop": 3}).encode(),
        json.dumps({"messages": USER, "stream": "yes"}).encode(),
        json.dumps({"messages": USER, "temperature": "hot"}).encode(),
        json.dumps({"messages": USER, "n": 10**9}).encode(),
        json.dumps({"messages": USER, "tool_choice": {"x": 1}}).encode(),
        json.dumps({"messages": USER, "response_format": {"type": "json_schema"}}).encode(),
        json.dumps({"messages": USER, "model": 3}).encode(),
    ],
)  # fmt: skip
def test_malformed_bodies_are_refused_in_openai_s_form(guarded_server: ModelServerProcess, body: bytes) -> None:
    answer = httpx.post(
        f"{guarded_server.url}/chat/completions", content=body, timeout=60,
        headers={**guarded_server.headers, "Content-Type": "application/json"},
    )  # fmt: skip
    assert answer.status_code == 400, answer.text
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_what_is_no_http_and_who_says_nothing_disturbs_nobody(guarded_server: ModelServerProcess) -> None:
    clients = [RawClient(guarded_server) for _ in range(200)]
    for number, client in enumerate(clients):
        match number % 4:
            case 0:
                client.socket.sendall(b"\x16\x03\x01 this is no HTTP\r\n\r\n")
            case 1:  # a head that never ends
                client.socket.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nX-A: ")
            case 2:  # a body that never comes
                client.send("POST", "/v1/chat/completions", {**guarded_server.headers, "Content-Length": "500"}, b"{")
            case 3:
                pass
    assert_answers(guarded_server)
    for client in clients:
        client.close()
    assert_answers(guarded_server)


def test_clients_that_do_not_read_disturb_nobody(guarded_server: ModelServerProcess) -> None:
    clients = [RawClient(guarded_server) for _ in range(8)]
    for client in clients:
        client.send_chat(guarded_server.headers, **ENDLESS)
    time.sleep(1)
    assert_answers(guarded_server)
    close_all(guarded_server, clients)


def test_a_full_queue_says_when_to_come_back(guarded_server: ModelServerProcess) -> None:
    clients = [RawClient(guarded_server) for _ in range(80)]
    for client in clients:
        client.send_chat(guarded_server.headers, **ENDLESS)
    for client in clients:
        assert b" 200 " in client.read_until(b"\r\n\r\n")
    refused = guarded_server.chat(max_tokens=2)
    assert refused.status_code == 429
    assert refused.headers["retry-after"] == "1"
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert httpx.get(f"{guarded_server.origin}/health").status_code == 200
    close_all(guarded_server, clients)


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "path": "/etc/hostname"}, {"type": "image", "url": "/etc/hostname"},
        {"type": "image_url", "image_url": "/etc/hostname"}, {"type": "image_url", "image_url": {"url": "file:///etc/hostname"}},
        {"type": "image_url", "image_url": {"url": "~/x.png"}}, {"type": "image_url", "path": "/etc/hostname"},
        {"type": "image_url", "image_url": {"url": "data:,", "path": "x"}, "path": "/etc/hostname"},
        {"type": "image_url", "image_url": {"path": "/etc/hostname"}}, {"type": "input_audio"}, "text", 3,
    ],
)  # fmt: skip
def test_paths_in_parts_of_messages_are_refused(part: object) -> None:
    with pytest.raises(BodyError, match="image_url"):
        read_call({"messages": [{"role": "user", "content": [part]}]}, chat=True)


def test_nothing_is_fetched(guarded_server: ModelServerProcess, hub: LocalHub) -> None:
    address = f"{hub.endpoint}/picture.png"
    image = guarded_server.chat(messages=image_message({"url": address}))
    assert (image.status_code, image.json()["error"]["param"]) == (400, "messages")
    assert "--allow-remote-images" in image.json()["error"]["message"]
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": f"{hub.endpoint}/schema.json"}}}
    assert guarded_server.chat(response_format=schema, max_tokens=4).status_code == 400
    assert hub.journal.requests == []
    assert_answers(guarded_server)


@pytest.fixture(scope="module")
def image_server(session_folder: Path) -> Iterator[ModelServerProcess]:
    pytest.importorskip("PIL", reason="the extra `vision` is not installed")
    from support.tiny_vision_model import make_tiny_llava

    folder = make_tiny_llava(session_folder / "served-llava")
    more = ("--backend", "torch", "--device", "cpu", "--task", "image-text-to-text")
    with model_server(session_folder, "--model", str(folder), *more) as server:
        yield server


def data_url(width: int, height: int) -> str:
    from PIL import Image

    content = io.BytesIO()
    Image.new("1", (width, height)).save(content, "png")
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"


def test_images_come_as_data_and_are_bounded(image_server: ModelServerProcess, hub: LocalHub) -> None:
    good = data_url(20, 30)
    answer = image_server.chat(messages=image_message({"url": good}), max_tokens=3)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] == 3
    for bad in (
        data_url(20_000, 20_000),
        "data:image/png;base64,###",
        "data:image/png,x",
        "data:image/png;base64,AAAA",
    ):
        answer = image_server.chat(messages=image_message({"url": bad}), max_tokens=3)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_prompt"), bad[:40]
    parts = [{"type": "image_url", "image_url": {"url": good}}] * 17
    many = image_server.chat(messages=[{"role": "user", "content": parts}], max_tokens=3)
    assert many.status_code == 400
    assert "16 images" in many.json()["error"]["message"]
    remote = image_server.chat(messages=image_message(f"{hub.endpoint}/picture.png"), max_tokens=3)
    assert remote.status_code == 400
    assert hub.journal.requests == []
