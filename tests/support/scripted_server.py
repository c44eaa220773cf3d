"""A server of the tests that says what it is told to say, for the forms of answers that no server at hand gives."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class ScriptedServer:
    """Answers every request to the chat route with the next of its answers, the last one again and again.

    A list is streamed, event by event; anything else is one JSON answer.

    Attributes:
        answers: Bodies that are still to come.
        models: Names of the models that it lists.
        bodies: JSON of the requests to the chat route.
    """

    def __init__(self, *answers: Any, models: tuple[str, ...] = ()) -> None:
        self.answers, self.models, self.bodies = list(answers), models, list[dict[str, Any]]()

    def __enter__(self) -> ScriptedServer:
        scripted = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

            def do_GET(self) -> None:
                listed = {"data": [{"id": name} for name in scripted.models]}
                self._send(200 if self.path == "/v1/models" else 404, "application/json", json.dumps(listed))

            def do_POST(self) -> None:
                scripted.bodies.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
                answer = scripted.answers.pop(0) if len(scripted.answers) > 1 else scripted.answers[0]
                if isinstance(answer, list):
                    events = [f"data: {json.dumps(event, ensure_ascii=False)}\n\n" for event in answer]
                    self._send(200, "text/event-stream", "".join(events))
                else:
                    self._send(200, "application/json", json.dumps(answer))

            def _send(self, status: int, kind: str, text: str) -> None:
                content = text.encode()
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
