"""An S3 server in a thread of the tests, and what was asked of it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any

import pytest
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from moto.s3.models import s3_backends
from werkzeug.serving import WSGIRequestHandler, make_server

from ditr_cache import remote

BUCKET = "bucket"

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
    # Nothing of this machine, and nothing outside of it.
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": "/dev/null",
    "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
    "NO_PROXY": "127.0.0.1",
}


_connected: list[ObjectStore | None] = [None]


class _Quiet(WSGIRequestHandler):
    protocol_version = "HTTP/1.1"  # connections are kept, as those of S3 are

    def log(self, *_: object, **__: object) -> None:
        pass


class ObjectStore:
    """The server, its one bucket, and the requests since they were counted last.

    Args:
        url: of the endpoint.
    """

    def __init__(self) -> None:
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._requests: list[tuple[str, str]] = []
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True, request_handler=_Quiet)
        self._server.daemon_threads = True  # type: ignore[attr-defined]
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def _answer(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        query = environ.get("QUERY_STRING", "")
        method = "LIST" if "list-type" in query else environ["REQUEST_METHOD"]
        self._requests.append((method, environ["PATH_INFO"].removeprefix(f"/{BUCKET}/")))
        answer: Iterable[bytes] = self._moto(environ, start)
        return answer

    def taken(self) -> list[tuple[str, str]]:
        """(method, key) of the requests since the last call; a listing is a LIST."""
        requests, self._requests = self._requests, []
        return requests

    @property
    def bucket(self) -> Any:
        """The bucket as moto holds it."""
        return s3_backends["123456789012"]["aws"].buckets[BUCKET]

    @property
    def keys(self) -> list[str]:
        """Of all objects."""
        return sorted(self.bucket.keys)

    def content(self, key: str) -> bytes:
        """Of an object."""
        return bytes(self.bucket.keys[key].value)

    def put(self, key: str, content: bytes) -> None:
        """Replace an object behind the back of everybody."""
        s3_backends["123456789012"]["aws"].put_object(BUCKET, key, content)

    def remove(self, key: str) -> None:
        """Remove an object behind the back of everybody."""
        self.bucket.keys.pop(key)

    def clear(self) -> None:
        """An empty bucket, and no requests."""
        backend = s3_backends["123456789012"]["aws"]
        backend.reset()
        backend.create_bucket(BUCKET, "us-east-1")
        self.taken()

    def stop(self) -> None:
        """End the thread."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def running() -> Iterator[ObjectStore]:
    """A server for as long as a generator runs."""
    store = ObjectStore()
    yield store
    store.stop()


def use(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make it the S3 of this process and of those that it starts, and empty it."""
    for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": store.url}.items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_CA_BUNDLE", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    if store is not _connected[-1]:  # a connection keeps what it was made with, and takes a while to make
        remote._connection.cache_clear()
        _connected.append(store)
    store.clear()


def reconnect(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connect with what the environment says now, until the end of a test."""
    monkeypatch.setattr(remote, "_connection", cache(remote._connection.__wrapped__))
