"""Model servers as processes of their own, as an operator starts them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from support.ports import free_port
from support.prefect_services import wait_until

USER = [{"role": "user", "content": "What is the capital of Spain?"}]


class ModelServerProcess:
    """A server that can be killed and started again at its port."""

    def __init__(self, folder: Path, *arguments: str, key: str | None = None) -> None:
        self.port, self.key = free_port(), key
        self.origin = f"http://127.0.0.1:{self.port}"
        self.url = f"{self.origin}/v1"
        self.log = folder / f"model-server-{self.port}.log"
        self.arguments = arguments
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the process and wait until it answers."""
        command = [sys.executable, "-m", "prefect_huggingface.deployments.model_server", "--port", str(self.port)]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*command, *self.arguments], env={**os.environ, "OMP_NUM_THREADS": "2"}, stdin=subprocess.DEVNULL,
                stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip
        wait_until(self.is_there, 120, "the start of the model server", every=0.05)

    def is_there(self) -> bool:
        """Whether the server accepts connections."""
        assert self.process is not None
        assert self.process.poll() is None, self.log.read_text()
        try:
            socket.create_connection(("127.0.0.1", self.port), 1).close()
        except OSError:
            return False
        return True

    def kill(self, number: int = signal.SIGKILL, seconds: float = 60) -> int:
        """End the process by a signal and return its exit code."""
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(seconds)

    @property
    def headers(self) -> dict[str, str]:
        """Headers with the key."""
        return {"Authorization": f"Bearer {self.key}"} if self.key else {}

    def post(self, path: str, **body: Any) -> httpx.Response:
        """Post a body."""
        return httpx.post(f"{self.origin}{path}", json=body, headers=self.headers, timeout=120)

    def chat(self, **body: Any) -> httpx.Response:
        """Ask for a chat completion."""
        return self.post("/v1/chat/completions", **{"messages": USER, **body})

    def read_metric(self, name: str) -> float:
        """Return the sum of a metric over its labels."""
        lines = httpx.get(f"{self.origin}/metrics", headers=self.headers, timeout=60).text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.partition("{")[0] == name)


@contextmanager
def model_server(folder: Path, *arguments: str, key: str | None = None) -> Iterator[ModelServerProcess]:
    """Run a server until the block ends."""
    server = ModelServerProcess(folder, *arguments, key=key)
    try:
        server.start()
        yield server
    finally:
        if server.process is not None and server.process.poll() is None:
            server.kill()


class RawClient:
    """A connection whose bytes the test writes itself."""

    def __init__(self, server: ModelServerProcess) -> None:
        self.socket = socket.create_connection(("127.0.0.1", server.port), 30)

    def send(self, method: str, path: str, headers: dict[str, str], body: bytes = b"") -> None:
        """Send a request, of whose body less may be sent than the headers say."""
        head = {"Host": "127.0.0.1", "Content-Type": "application/json", "Content-Length": str(len(body)), **headers}
        lines = "".join(f"{name}: {value}\r\n" for name, value in head.items())
        self.socket.sendall(f"{method} {path} HTTP/1.1\r\n{lines}\r\n".encode() + body)

    def send_chat(self, headers: dict[str, str], **body: Any) -> None:
        """Send a whole request for a chat completion."""
        self.send("POST", "/v1/chat/completions", headers, json.dumps({"messages": USER, **body}).encode())

    def read_until(self, mark: bytes, seconds: float = 60) -> bytes:
        """Return what comes up to a mark, or up to the end of the connection."""
        content, end = b"", time.monotonic() + seconds
        while mark not in content and time.monotonic() < end:
            self.socket.settimeout(max(end - time.monotonic(), 0.01))
            part = self.socket.recv(65536)
            if not part:
                break
            content += part
        return content

    def close(self) -> None:
        """Close the connection."""
        self.socket.close()
