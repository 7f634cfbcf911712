"""As much of a W&B server, on this machine's loopback, as an online run or `wandb sync` talks to."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from typing import Any

KEY = "0123456789abcdef0123456789abcdef01234567"


class Server(ThreadingHTTPServer):
    """What was sent, and the answers that a faithful server gives to it.

    Attributes:
        runs: by id, the last UpsertBucket's variables.
        history: by id, the rows at their offsets.
        files: name -> content, of uploads.
        artifacts: the variables of every CreateArtifact.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.runs: dict[str, dict[str, Any]] = {}
        self.history: dict[str, dict[int, dict[str, Any]]] = {}
        self.files: dict[str, bytes] = {}
        self.artifacts: list[dict[str, Any]] = []
        self.lock = Lock()

    def environment(self) -> dict[str, str]:
        """What makes a client come here."""
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": KEY}

    def rows(self, run: str) -> list[dict[str, Any]]:
        """A run's history in order."""
        return [row for _, row in sorted(self.history[run].items())]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is none."""

    def answer(self, operation: str, variables: dict[str, Any]) -> Any:
        """The `data` of a GraphQL answer."""
        if operation == "Viewer":
            return {"viewer": {"id": "u", "entity": "me", "username": "me", "email": "", "flags": "{}", "teams": None}}
        if operation == "RunResumeStatus":
            known = self._bucket(variables["name"]) if variables["name"] in self.runs else None
            return {"model": {"id": "p", "name": variables["project"], "bucket": known}}
        if operation == "UpsertBucket":
            self.runs.setdefault(variables["name"], {}).update({k: v for k, v in variables.items() if v is not None})
            return {"upsertBucket": {"bucket": self._bucket(variables["name"]), "inserted": True}}
        if operation == "CreateRunFiles":
            places = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in variables["files"]]
            return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": places}}
        if operation == "CreateArtifact":
            self.artifacts.append(variables)
            made = {"id": "a", "state": "COMMITTED", "artifactSequence": {"id": "s", "latestArtifact": None}}
            return {"createArtifact": {"artifact": made}}
        if operation == "ServerFeaturesQuery":
            return {"serverInfo": {"features": []}}
        return None  # the client does without

    def _bucket(self, name: str) -> dict[str, Any]:
        project = {"id": "p", "name": "afterburner", "entity": {"id": "e", "name": "me"}}
        rows = self.rows(name) if name in self.history else []
        return {
            "id": "r",
            "name": name,
            "displayName": name,
            "description": "",
            "config": "{}",
            "sweepName": None,
            "project": project,
            "historyLineCount": len(rows),
            "eventsLineCount": 0,
            "logLineCount": 0,
            "historyTail": json.dumps([json.dumps(row) for row in rows[-1:]]),
            "eventsTail": "[]",
            "summaryMetrics": "{}",
            "tags": [],
            "wandbConfig": '{"t": 1}',
        }

    def stream(self, run: str, body: dict[str, Any]) -> None:
        """A file_stream post."""
        part = (body.get("files") or {}).get("wandb-history.jsonl")
        if part:
            place = self.history.setdefault(run, {})
            place.update({part["offset"] + i: json.loads(line) for i, line in enumerate(part["content"])})


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def _serve(self) -> None:
        body = self._body()
        answer: dict[str, Any] = {}
        with self.server.lock:
            if self.path.startswith("/graphql"):
                asked = json.loads(body)
                data = self.server.answer(asked["operationName"], asked.get("variables") or {})
                answer = {"data": data} if data else {"errors": [{"message": "not a part of this server"}]}
            elif self.path.endswith("/file_stream"):
                self.server.stream(self.path.split("/")[-2], json.loads(body))
            elif self.path.startswith("/upload/"):
                self.server.files[self.path.removeprefix("/upload/")] = body
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PUT = _serve  # noqa: N815

    def log_message(self, *arguments: Any) -> None:
        """Say nothing."""


@contextmanager
def wandb_server() -> Iterator[Server]:
    """A server for the time of a test."""
    server = Server()
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
