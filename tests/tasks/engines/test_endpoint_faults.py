"""What the endpoint engine does when its server fails, is away, or is no inference server."""

from __future__ import annotations

import logging
import socket
import threading
import time
from concurrent.futures import Future
from email.utils import formatdate

import pytest

from prefect_huggingface.blocks import GenerationOptions, HuggingFaceCredentials, InferenceEndpoint
from prefect_huggingface.tasks.engines.endpoint_engine import EndpointEngine
from prefect_huggingface.tasks.records import Completion, Request
from support.tgi_server import TgiServer

PROMPT = "The capital of France is"
OPTIONS = GenerationOptions(max_new_tokens=8)
TEXT_ROUTE = "^/$"


def make(url, **fields):
    return EndpointEngine(InferenceEndpoint(**{"url": url, "options": OPTIONS, "timeout_seconds": 20, **fields}))


def ask(url, on_text=None, **fields):
    with make(url, **fields) as engine:
        return engine.submit(Request(PROMPT), on_text).result(timeout=60)


@pytest.fixture(scope="session")
def whole(tgi_server):
    """Undisturbed text, for the same model and prompt."""
    tgi_server.clear()
    found = ask(tgi_server.url)
    assert found.error is None
    return found.text


@pytest.fixture
def other(tgi_server):
    """A second server, which is another host for the client."""
    with TgiServer(tgi_server.protocol.model) as server:
        yield server


@pytest.mark.parametrize("status", [408, 424, 425, 429, 500, 502, 503, 504])
def test_a_passing_failure_is_tried_again(tgi, whole, status):
    tgi.fault("status", status=status, path=TEXT_ROUTE)
    found = ask(tgi.url)
    assert (found.text, found.error) == (whole, None)
    assert [entry.status for entry in tgi.posts()] == [status, 200]


@pytest.mark.parametrize("status", [424, 429, 500])
def test_a_lasting_failure_of_a_request_is_its_error(tgi, status):
    tgi.fault("status", status=status, path=TEXT_ROUTE, times=None)
    found = ask(tgi.url, max_attempts=3)
    assert found.error_code == ("rate_limited" if status == 429 else "engine_error")
    assert "It was tried 3 times." in found.error
    assert "Made on purpose" in found.error
    assert len(tgi.posts()) == 3


@pytest.mark.parametrize("as_date", [False, True])
def test_retry_after_is_honoured(tgi, whole, as_date):
    seconds = 2
    after = formatdate(time.time() + seconds + 1, usegmt=True) if as_date else str(seconds)
    tgi.fault("status", status=429, path=TEXT_ROUTE, headers={"Retry-After": after})
    began = time.monotonic()
    assert ask(tgi.url).text == whole
    # A date has whole seconds only.
    assert seconds - 0.1 * as_date <= time.monotonic() - began < seconds + 3


def test_a_server_that_asks_for_a_longer_wait_than_allowed_is_given_up(tgi):
    tgi.fault("status", status=429, path=TEXT_ROUTE, headers={"Retry-After": "3600"})
    began = time.monotonic()
    found = ask(tgi.url)
    assert found.error_code == "rate_limited"
    assert "3600" in found.error
    assert time.monotonic() - began < 5


def test_waits_grow(tgi):
    tgi.fault("status", status=429, path=TEXT_ROUTE, times=None)
    began = time.monotonic()
    found = ask(tgi.url, max_attempts=4)
    # 0.25 + 0.5 + 1 seconds, each up to a quarter shorter or longer.
    assert 1.2 < time.monotonic() - began < 6
    assert found.error_code == "rate_limited"


@pytest.mark.parametrize("kind", ["cut", "end_early", "error", "stall_stream"])
@pytest.mark.parametrize("chat", [False, True])
def test_a_stream_that_breaks_goes_on_where_it_was(tgi, kind, chat):
    prompts = {"messages": [{"role": "user", "content": PROMPT}]} if chat else {"prompt": PROMPT}
    with make(tgi.url, timeout_seconds=0.5) as engine:
        whole = engine.submit(Request(**prompts)).result().text
        tgi.fault(kind, after=3)
        pieces: list[str] = []
        found = engine.submit(Request(**prompts), pieces.append).result(timeout=30)
    assert (found.text, found.error) == (whole, None)
    assert "".join(pieces) == whole
    assert sum(entry.body.get("stream", False) for entry in tgi.posts()) == 3


def test_a_sampled_stream_that_breaks_and_comes_differently_is_an_error(tgi):
    tgi.fault("cut", after=4)
    with make(tgi.url, options=GenerationOptions(max_new_tokens=8, do_sample=True, temperature=3.0, seed=1)) as engine:
        pieces: list[str] = []
        tgi.protocol.seed_offset = 1
        found = engine.submit(Request(PROMPT), pieces.append).result(timeout=30)
    assert (found.error_code, found.text) == ("unavailable", "")
    assert "differently" in found.error


def test_words_of_a_server_about_a_code_are_not_the_code(tgi, whole):
    tgi.fault("status", status=500, words="The worker said model_unavailable.", path=TEXT_ROUTE)
    assert ask(tgi.url).text == whole


def test_a_dropped_connection_is_tried_again(tgi, whole):
    tgi.fault("hang_up", path=TEXT_ROUTE, times=2)
    assert ask(tgi.url).text == whole


def test_silence_is_bounded(tgi):
    tgi.fault("stall", path=TEXT_ROUTE, times=None)
    began = time.monotonic()
    found = ask(tgi.url, timeout_seconds=0.5, outage_timeout_seconds=1)
    assert time.monotonic() - began < 6
    assert found.error_code == "unavailable"
    assert "was silent for 0.5 s" in found.error


@pytest.mark.parametrize("chat", [False, True])
def test_an_answer_that_takes_longer_than_a_silence_may_is_no_outage(tgi, chat):
    prompts = {"messages": [{"role": "user", "content": PROMPT}]} if chat else {"prompt": PROMPT}
    with make(tgi.url, timeout_seconds=1.0, outage_timeout_seconds=1, max_attempts=1) as engine:
        whole = engine.submit(Request(**prompts)).result()
        tgi.protocol.step_seconds = 2.0 / whole.generated_tokens
        completions = [future.result(30) for future in [engine.submit(Request(**prompts)) for _ in range(8)]]
    assert {(found.text, found.error) for found in completions} == {(whole.text, None)}
    assert min(found.seconds for found in completions) > 1


def test_a_sleeping_endpoint_is_waited_for_with_progress(tgi, whole, caplog):
    asleep = tgi.fault("status", status=503, words='{"error":"Service Unavailable"}', path=TEXT_ROUTE, times=None)
    wake = threading.Timer(5, lambda: tgi.faults.remove(asleep))
    wake.start()
    began = time.monotonic()
    with caplog.at_level(logging.INFO):
        found = ask(tgi.url, max_attempts=2)
    assert found.text == whole
    assert 4.5 < time.monotonic() - began < 9
    lines = [line for line in caplog.messages if tgi.url in line]
    assert any("Waiting for" in line and "of at most 600 s" in line for line in lines)
    assert any("is back after" in line for line in lines)


def test_a_sleeping_endpoint_is_not_waited_for_longer_than_allowed(tgi):
    tgi.fault("status", status=503, path="", method=None, times=None)
    began = time.monotonic()
    found = ask(tgi.url, wake_timeout_seconds=1)
    assert time.monotonic() - began < 5
    assert found.error_code == "unavailable"
    assert "`wake_timeout_seconds`" in found.error


def test_the_circuit_breaker_fails_fast_while_the_endpoint_is_down_and_closes_again(tgi, whole):
    with make(tgi.url, outage_timeout_seconds=1, max_concurrency=8) as engine:
        assert engine.submit(Request(PROMPT)).result().text == whole
        tgi.stop()
        try:
            first = [engine.submit(Request(PROMPT, id=i)) for i in range(40)]
            assert {future.result(timeout=10).error_code for future in first} == {"unavailable"}
            began = time.process_time()
            late = [engine.submit(Request(PROMPT, id=i)) for i in range(200)]
            assert {future.result(timeout=10).error_code for future in late} == {"unavailable"}
            assert time.process_time() - began < 2
        finally:
            tgi.start()
        end = time.monotonic() + 20
        while (found := engine.submit(Request(PROMPT)).result()).error and time.monotonic() < end:
            time.sleep(0.05)
        assert found.text == whole


def test_one_request_at_a_time_tries_an_endpoint_that_is_down(tgi):
    tgi.fault("status", status=503, path="", method=None, times=None)
    with make(tgi.url, wake_timeout_seconds=2, max_concurrency=8) as engine:
        futures = [engine.submit(Request(PROMPT, id=i)) for i in range(50)]
        assert {future.result(timeout=20).error_code for future in futures} == {"unavailable"}
    # Fifty requests that each tried on their own would have sent hundreds.
    assert len(tgi.requests) < 60


def test_a_row_that_the_server_cannot_take_does_not_stop_the_others(tgi, whole):
    tgi.fault("status", status=503, path=TEXT_ROUTE, times=None, contains="poison")
    with make(tgi.url, max_attempts=3, max_concurrency=4, wake_timeout_seconds=2) as engine:
        requests = [Request("poison" if i % 10 == 3 else PROMPT, id=i) for i in range(40)]
        rows: dict[int, Completion] = {row.request_id: row for row in engine.generate(requests)}
    assert [rows[i].error_code for i in range(40)] == ["unavailable" if i % 10 == 3 else None for i in range(40)]
    assert {rows[i].text for i in range(40) if i % 10 != 3} == {whole}


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [(401, "unauthorized", "none is configured"), (403, "unauthorized", "token"), (404, "not_found", "`url`"),
     (405, "bad_answer", "`protocol`"), (413, "too_long", "Shorten"), (422, "invalid_option", "Made on purpose"),
     (400, "invalid_option", "options"), (501, "bad_answer", "501")],
)  # fmt: skip
def test_a_refusal_is_told_at_once(tgi, status, code, words):
    tgi.fault("status", status=status, path=TEXT_ROUTE, times=None)
    found = ask(tgi.url)
    assert found.error_code == code
    assert words in found.error
    assert tgi.url in found.error
    assert len(tgi.posts()) == 1


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("`inputs` tokens + `max_new_tokens` must be <= 4096. Given: 4000 `inputs` tokens", "too_long"),
        ("This model's maximum context length is 4096 tokens. However, you requested 5000 tokens", "too_long"),
        ('{"error": {"message": "9000 characters do not fit", "code": "context_length_exceeded"}}', "too_long"),
        ("max_tokens is too large: 9999. This model supports at most 4096 completion tokens", "too_long"),
        ("Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens'",
         "invalid_option"),
        ("max_tokens must be at least 1, got 0.", "invalid_option"),
        ("`min_new_tokens` must be at most `max_new_tokens`, got 5.", "invalid_option"),
    ],
)  # fmt: skip
def test_a_refusal_of_an_option_is_not_a_prompt_that_is_too_long(tgi, words, code):
    tgi.fault("status", status=400, words=words, path=TEXT_ROUTE, times=None)
    assert ask(tgi.url).error_code == code


def test_a_wrong_token_is_told_without_showing_it(tgi):
    tgi.token = "right-token"
    credentials = HuggingFaceCredentials(token="wrong-token")
    found = ask(tgi.url, credentials=credentials)
    assert found.error_code == "unauthorized"
    assert "does not accept the token" in found.error
    assert "wrong-token" not in repr(found)
    tgi.fault("status", status=400, words="bad key wrong-token", path=TEXT_ROUTE, times=None)
    tgi.token = None
    assert "wrong-token" not in repr(ask(tgi.url, credentials=credentials))
    assert ask(tgi.url, credentials=HuggingFaceCredentials(token="right-token")).error_code == "invalid_option"


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(("kind", "fields"), [("html", {}), ("text", {}), ("text", {"words": '{"hello": 1}'})])
def test_what_is_no_inference_server_is_recognised(tgi, kind, fields, streamed):
    tgi.fault(kind, path=TEXT_ROUTE, times=None, **fields)
    found = ask(tgi.url, (lambda text: None) if streamed else None)
    assert found.error_code == "bad_answer"
    assert "Check `url` and `protocol`" in found.error


def test_a_web_site_is_recognised(tgi):
    tgi.fault("html", path="", method=None, times=None)
    found = ask(tgi.url)
    assert (found.error_code, "a web page" in found.error) == ("bad_answer", True)


@pytest.mark.parametrize("streamed", [False, True])
def test_an_answer_that_is_too_large_is_refused_before_it_is_read(tgi, streamed):
    tgi.fault("large", size=500_000_000, path=TEXT_ROUTE, times=None)
    began = time.monotonic()
    found = ask(tgi.url, (lambda text: None) if streamed else None, max_answer_mb=2)
    assert found.error_code == "bad_answer"
    assert "larger than 2 MB" in found.error
    assert time.monotonic() - began < 10


def test_a_refused_connection_and_an_unknown_host_are_told_in_time():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    began = time.monotonic()
    found = ask(f"http://127.0.0.1:{port}", outage_timeout_seconds=1)
    assert found.error_code == "unavailable"
    assert "cannot be reached" in found.error
    found = ask("http://no-such-host.invalid", outage_timeout_seconds=1)
    assert found.error_code == "unavailable"
    assert time.monotonic() - began < 20


def test_a_server_without_http_and_a_wrong_scheme_are_recognised(tgi):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=greet, args=(listener,), daemon=True).start()
        found = ask(f"http://127.0.0.1:{listener.getsockname()[1]}")
    assert (found.error_code, "not HTTP" in found.error) == ("bad_answer", True)
    found = ask(tgi.url.replace("http", "https"))
    assert (found.error_code, "scheme" in found.error) == ("unavailable", True)


def greet(listener):
    """Answer what is not HTTP to every client."""
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        connection.recv(65536)
        connection.sendall(b"220 mail.example ESMTP\r\n\r\n")
        connection.close()


def test_options_that_a_server_refuses_are_not_dropped(tgi, whole):
    words = '{"error": "The following `model_kwargs` are not used by the model: [\'seed\'] (note: typos)"}'
    tgi.fault("status", status=400, words=words, path=TEXT_ROUTE, times=None)
    found = ask(tgi.url, options=GenerationOptions(max_new_tokens=8, do_sample=True, seed=1))
    assert found.error_code == "invalid_option"
    assert "not used by the model" in found.error
    assert len(tgi.posts()) == 1


def test_the_offline_mode_of_the_hub_is_not_for_endpoints(tgi, whole, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert ask(tgi.url).text == whole


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirection_on_the_same_host_is_followed(tgi, whole, status):
    tgi.fault("redirect", status=status, location=f"{tgi.url}/generate", path=TEXT_ROUTE, times=None)
    found = ask(tgi.url)
    if status in (307, 308):
        assert found.text == whole
    else:
        # These turn the request into one without a prompt.
        assert found.error_code in ("not_found", "bad_answer")


def test_redirections_in_circles_end(tgi):
    tgi.fault("redirect", status=307, location=tgi.url, path=TEXT_ROUTE, times=None)
    assert ask(tgi.url).error_code == "bad_answer"


def test_a_deadline_ends_the_waiting_for_an_outage(tgi):
    tgi.fault("status", status=503, path="", method=None, times=None)
    began = time.monotonic()
    with make(tgi.url) as engine:
        future: Future[Completion] = engine.submit(
            Request(PROMPT, options=GenerationOptions(max_new_tokens=8, deadline_seconds=1.5))
        )
        found = future.result(timeout=20)
    assert (found.finish_reason, found.text) == ("deadline", "")
    assert time.monotonic() - began < 5
