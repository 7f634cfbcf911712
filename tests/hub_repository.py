"""What the loopback hub keeps: users, files, repositories; and the failures that were ordered."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class User:
    """Who a token belongs to; `may_write` is the token's right."""

    name: str
    may_write: bool = True


@dataclass(frozen=True)
class File:
    """One file of a commit."""

    content: bytes
    large: bool

    @property
    def oid(self) -> str:
        """Git's hash of the blob: of the content, or of the pointer to a large file."""
        blob = f"oid sha256:{self.sha256}\nsize {len(self.content)}\n".encode() if self.large else self.content
        return hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.large else self.oid


@dataclass
class Repository:
    """Commits by hash, each a whole tree, and what points at them."""

    private: bool
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, tree: dict[str, File], summary: str) -> str:
        parent = self.branches.get(branch, "")
        listing = sorted((name, file.oid) for name, file in tree.items())
        sha = hashlib.sha1(json.dumps([parent, summary, len(self.commits), listing]).encode()).hexdigest()
        self.commits[sha] = tree
        self.branches[branch] = sha
        return sha

    def resolve(self, revision: str) -> str | None:
        if revision in self.commits:
            return revision
        return self.branches.get(revision) or self.tags.get(revision)


@dataclass
class Fault:
    """What goes wrong with requests `METHOD PATH` that match, so many times (-1: always).

    Kinds: an HTTP status; `drop` closes the connection unanswered; `drop_after` does the work first; `hang` answers
    nothing until the server ends; `short` ends a download's body early; `flip` changes a byte of it.
    """

    pattern: str
    kind: int | str
    times: int = -1
    headers: dict[str, str] = field(default_factory=dict)
    body: Any = None
