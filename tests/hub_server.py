"""A model hub on the loopback: what huggingface_hub asks for, commits that are whole or absent, failures on order.

As on the real one there are users with tokens, private repositories, branches and tags, a check of cards, and a store
for large files under their SHA-256, reached at another host name and without the token.  `tests/hub_routes.py` answers.
"""

from __future__ import annotations

import re
import threading
from http.server import ThreadingHTTPServer
from typing import Any

from tests.hub_repository import Fault, File, Repository, User
from tests.hub_routes import Handler


class HubServer:
    """`with HubServer() as hub:` serves at `hub.url`."""

    def __init__(self) -> None:
        self.users = {"hf_writer": User("you"), "hf_reader": User("you", may_write=False), "hf_other": User("other")}
        self.repos: dict[str, Repository] = {}
        self.store: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.lock = threading.RLock()
        self.ending = threading.Event()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.http.daemon_threads = True
        self.port = self.http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.storage = f"http://localhost:{self.port}/storage"  # another host: the token must not follow

    def __enter__(self) -> HubServer:
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ending.set()
        self.http.shutdown()
        self.http.server_close()

    def reset(self) -> None:
        """Forget all repositories, files, faults, and what a test put in the way of them."""
        vars(self).pop("take_fault", None)
        with self.lock:
            for kept in (self.repos, self.store, self.faults, self.requests):
                kept.clear()

    def fail(self, pattern: str, kind: int | str, times: int = -1, **more: Any) -> None:
        """Order a failure; see `Fault`."""
        self.faults.append(Fault(pattern, kind, times, **more))

    def create(self, name: str, private: bool = False) -> Repository:
        """A repository as the Hub makes it: with one commit."""
        repo = self.repos[name] = Repository(private)
        repo.commit("main", {".gitattributes": File(b"*.safetensors filter=lfs\n", False)}, "initial commit")
        return repo

    def tree(self, name: str, revision: str = "main") -> dict[str, bytes]:
        """Contents by file name, without what the server itself put there."""
        repo = self.repos[name]
        files = repo.commits[repo.resolve(revision) or ""]
        return {path: file.content for path, file in files.items() if path != ".gitattributes"}

    def take_fault(self, request: str) -> Fault | None:
        """The failure that is due for this request."""
        with self.lock:
            for fault in self.faults:
                if fault.times != 0 and re.search(fault.pattern, request):
                    fault.times -= 1
                    return fault
        return None
