"""A browser's part in the tests of the page: cookies, forms, and nothing else."""

from __future__ import annotations

import http.client
import json
import re
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from html import unescape
from typing import Any
from urllib.parse import urlencode, urlsplit

import uvicorn

from lifelong import app
from lifelong.app.workspace import Workspace

TOKEN = "the-token"


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode()

    @property
    def words(self) -> str:
        """Without the tags."""
        return " ".join(unescape(re.sub(r"<[^>]*>", " ", self.text)).split())

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    def value(self, name: str) -> str:
        """Of the first field of this name in a form."""
        found = re.search(rf'name="{name}" value="([^"]*)"', self.text)
        assert found is not None, f"no field {name} in {self.words[:300]}"
        return unescape(found[1])


@dataclass
class Client:
    port: int
    cookie: str = ""
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def origin(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def send(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] = {},  # read only
    ) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        sent = {"Cookie": self.cookie, **self.headers, **headers}
        try:
            connection.request(method, path, body, {k: v for k, v in sent.items() if v})
            answer = connection.getresponse()
            named = {name.lower(): value for name, value in answer.getheaders()}
            found = Answer(answer.status, named, answer.read())
        finally:
            connection.close()
        if (cookie := named.get("set-cookie")) is not None:
            self.cookie = cookie.split(";")[0]
        return found

    def get(self, path: str, **headers: str) -> Answer:
        """Follows where it is sent."""
        found = self.send("GET", path, headers=headers)
        for _ in range(3):
            if found.status == 303:
                found = self.send("GET", _path(found.headers["location"]))
        return found

    def post(self, path: str, fields: Sequence[tuple[str, Any]], **headers: str) -> Answer:
        """A form, from this page."""
        kind = {"Content-Type": "application/x-www-form-urlencoded", "Origin": self.origin}
        found = self.send("POST", path, urlencode(list(fields)).encode(), {**kind, **headers})
        return self.get(_path(found.headers["location"])) if found.status == 303 else found

    def post_json(self, path: str, content: Any) -> Answer:
        kind = {"Content-Type": "application/json", "Origin": self.origin}
        return self.send("POST", path, json.dumps(content).encode(), kind)

    def upload(self, path: str, fields: Mapping[str, str], name: str, data: bytes) -> Answer:
        line = "boundary-of-the-tests"
        parts = [
            f'--{line}\r\nContent-Disposition: form-data; name="{k}"\r\n\r\n{v}\r\n'.encode()
            for k, v in fields.items()
        ]
        head = f'--{line}\r\nContent-Disposition: form-data; name="file"; filename="{name}"\r\n'
        body = b"".join([*parts, head.encode(), b"\r\n", data, f"\r\n--{line}--\r\n".encode()])
        kind = {"Content-Type": f"multipart/form-data; boundary={line}", "Origin": self.origin}
        found = self.send("POST", path, body, kind)
        return self.get(_path(found.headers["location"])) if found.status == 303 else found

    def job(self, number: int = 1) -> Any:
        """Once it is over."""
        end = time.monotonic() + 120
        while (found := self.get(f"/api/jobs/{number}").json)["state"] in ("waiting", "running"):
            assert time.monotonic() < end, found
            time.sleep(0.05)
        return found


def _path(location: str) -> str:
    parts = urlsplit(location)
    return parts.path + (f"?{parts.query}" if parts.query else "")


@contextmanager
def served(workspace: Workspace) -> Iterator[Client]:
    """A client that has the token, of a server in a thread."""
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    made = app.make(workspace, token=TOKEN, hosts=frozenset({f"127.0.0.1:{port}"}))
    server = uvicorn.Server(uvicorn.Config(made, log_level="error", access_log=False))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    client = Client(port)
    while not server.started:
        time.sleep(0.01)
    try:
        client.get(f"/?token={TOKEN}")
        yield client
    finally:
        server.should_exit = True
        thread.join(30)
        listening.close()
