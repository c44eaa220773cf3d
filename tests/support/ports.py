"""Ports for servers that end and start again."""

from __future__ import annotations

import random
import socket

# The system takes the ports of outgoing connections from 32768 on. A client that calls a port there while its server
# is away may even be connected to itself.
FIRST, LAST = 20_000, 32_000


def free_port() -> int:
    """Return a loopback port that is free now, and that no outgoing connection will take."""
    while True:
        port = random.SystemRandom().randrange(FIRST, LAST)
        try:
            socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            continue
        return port
