"""A W&B server as far as a run needs one, which can fail in every way that a server can."""

from __future__ import annotations

import gzip
import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_OPERATION = re.compile(r"(?:query|mutation)\s+(\w+)")


class Server(ThreadingHTTPServer):
    """Answers W&B's client on 127.0.0.1, and keeps what runs send.

    Attributes:
        mode: ``well``; ``500`` or ``401`` to everything; ``hole``: takes requests and never answers; ``closed``.
        rows: steps that arrived, by the run's id.
        begun: ids of runs that were announced.
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, mode: str = "well"):
        self.mode = mode
        self.rows: dict[str, list[int]] = {}
        self.begun: list[str] = []
        self._connections: set[socket.socket] = set()
        self._over = threading.Event()
        super().__init__(("127.0.0.1", 0), _Handler)
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def fail(self, mode: str) -> None:
        """Be in ``mode`` from now on; connections that were open are dropped."""
        self.mode = mode
        if mode == "closed":
            self.shutdown()
            self.socket.close()
        for connection in list(self._connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def wait_over(self) -> None:
        """Never answer, until the test is over."""
        self._over.wait()

    def end(self) -> None:
        """Let all threads go."""
        self._over.set()
        if self.mode != "closed":
            self.shutdown()
            self.server_close()

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections.add(request)
        super().process_request(request, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no news."""


@contextmanager
def serving(mode: str = "well") -> Iterator[Server]:
    """A server that ends with the block."""
    server = Server(mode)
    try:
        yield server
    finally:
        server.end()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.server.mode == "hole":
            self.server.wait_over()
        if self.server.mode in ("500", "401"):
            return self._answer(int(self.server.mode), {"errors": [{"message": self.server.mode}]})
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        if self.path.endswith("/file_stream"):
            self._take(json.loads(body))
            return self._answer(200, {"exitcode": None, "limits": {}})
        if self.path == "/graphql":
            request = json.loads(body)
            found = _OPERATION.search(request["query"])
            data = self._data(found[1] if found else "", request.get("variables") or {})
            return self._answer(200, {"data": data} if data else {"errors": [{"message": "not known here"}]})
        return self._answer(200, {})

    do_GET = do_PUT = do_POST  # noqa: N815 -- the names that http.server calls

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, code: int, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _take(self, content: dict[str, Any]) -> None:
        run = self.path.split("/")[-2]
        history = content.get("files", {}).get("wandb-history.jsonl", {})
        rows = [json.loads(line) for line in history.get("content", [])]
        self.server.rows.setdefault(run, []).extend(row["step"] for row in rows if "train/loss" in row)

    def _data(self, operation: str, variables: dict[str, Any]) -> dict[str, Any]:
        me = {"id": "VXNlcjox", "name": "me"}
        project = {"id": "UHJvajox", "name": variables.get("project") or "ftlab", "entity": me}
        match operation:
            case "Viewer":
                return {
                    "viewer": {
                        "id": "VXNlcjox",
                        "entity": "me",
                        "username": "me",
                        "flags": "{}",
                        "teams": {"edges": []},
                    }
                }
            case "UpsertBucket":
                name = variables.get("name") or "unnamed"
                self.server.begun.append(name)
                bucket = {"id": name, "name": name, "displayName": name, "description": "", "config": "{}"}
                more = {"sweepName": None, "historyLineCount": 0, "project": project}
                return {"upsertBucket": {"bucket": bucket | more, "inserted": True}}
            case "RunResumeStatus":
                return {"model": project | {"bucket": None}}
            case "CreateRunFiles":
                host = f"http://{self.headers['Host']}/upload"
                files = [{"name": name, "uploadUrl": f"{host}/{name}"} for name in variables["files"]]
                return {"createRunFiles": {"runID": "1", "uploadHeaders": [], "files": files}}
        return {}
