"""A local S3 server, for places and batches on object storage."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

SETTINGS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}


@contextmanager
def serve_s3(bucket: str) -> Iterator[str]:
    """Serve S3 on a free port, point fsspec at it, and yield the URL of a new bucket."""
    import fsspec
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    old = dict(fsspec.config.conf)
    with mock.patch.dict(os.environ, SETTINGS):
        fsspec.config.conf["s3"] = {"endpoint_url": f"http://{host}:{port}"}
        try:
            fsspec.filesystem("s3", skip_instance_cache=True).mkdir(bucket)
            yield f"s3://{bucket}"
        finally:
            fsspec.config.conf.clear()
            fsspec.config.conf.update(old)
            server.stop()
