"""A local S3 server, for places and batches on object storage."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

SETTINGS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}


@contextmanager
def serve_s3(bucket: str) -> Iterator[str]:
    """Serve S3 on a free port, point fsspec at it here and in child processes, and yield the URL of a new bucket."""
    import fsspec
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # not a line for each request
    app = _one_write_at_a_time(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=MotoRequestHandler)
    thread = threading.Thread(target=server.serve_forever, name="s3-server", daemon=True)
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    old = dict(fsspec.config.conf)
    with mock.patch.dict(os.environ, {**SETTINGS, "FSSPEC_S3_ENDPOINT_URL": endpoint}):
        fsspec.config.conf["s3"] = {"endpoint_url": endpoint}
        try:
            fsspec.filesystem("s3", skip_instance_cache=True).mkdir(bucket)
            yield f"s3://{bucket}"
        finally:
            fsspec.config.conf.clear()
            fsspec.config.conf.update(old)
            server.shutdown()
            thread.join()


def _one_write_at_a_time(app: Any) -> Any:
    """Make conditional writes what they are on S3: moto looks and writes in two steps."""
    lock = threading.Lock()

    def serve(environ: Any, start_response: Any) -> Any:
        if environ["REQUEST_METHOD"] not in ("PUT", "POST", "DELETE"):
            return app(environ, start_response)
        with lock:
            return app(environ, start_response)

    return serve
