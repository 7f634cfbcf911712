"""Text that every Python install has: the standard library's sources, and the language reference behind `help()`.

Which document is held out depends on its name and on the other documents alone, so every machine with the same Python
has the same two parts in the same order.
"""

from __future__ import annotations

import ast
import re
import sysconfig
import tokenize
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from zlib import crc32

# Tests, demos, other people's packages, and tables of numbers that nobody writes by hand.
_LEFT_OUT_FOLDERS = frozenset(
    "__phello__ dist-packages encodings ensurepip idle_test idlelib lib-dynload site-packages test tests "
    "turtledemo".split()
)
_LEFT_OUT_FILES = frozenset({"html/entities.py", "pydoc_data/topics.py", "stringprep.py"})
_SHORTEST = 400  # characters; shorter files are re-exports
_HELD_OUT_OF_100 = 8
_SHINGLE = 8  # words
_SHARED_AT_MOST = 0.1


@dataclass(frozen=True)
class Document:
    """One module's source, named by its path under the library, or a topic of the reference (`reference/<topic>`)."""

    name: str
    text: str


def training_documents() -> tuple[Document, ...]:
    """What a backbone may learn from, by name."""
    return _parts()[0]


def held_out_documents() -> tuple[Document, ...]:
    """What it never sees: chosen by a hash of the name, and with hardly a phrase in common with any other document."""
    return _parts()[1]


@lru_cache(maxsize=1)
def _parts() -> tuple[tuple[Document, ...], tuple[Document, ...]]:
    return split(all_documents())


def split(documents: list[Document]) -> tuple[tuple[Document, ...], tuple[Document, ...]]:
    """(training, held out) of any documents, each in the order given.

    A document that the hash chose is held out only if at most a tenth of its 8-word phrases occur in another document:
    otherwise what is learned from the other would be asked for again.
    """
    chosen = {d.name for d in documents if crc32(d.name.encode()) % 100 < _HELD_OUT_OF_100}
    count = Counter(shingle for d in documents for shingle in _shingles(d.text))
    held_out = {d.name for d in documents if d.name in chosen and _shared(d, count) <= _SHARED_AT_MOST}
    return (
        tuple(d for d in documents if d.name not in held_out),
        tuple(d for d in documents if d.name in held_out),
    )


def all_documents() -> list[Document]:
    """Every document, sorted by name.

    Raises:
        ValueError: this Python has no library sources on disk.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    found = [*_sources(root), *_reference(root)]
    if not found:
        raise ValueError(f"{root} holds no standard library sources: use a Python that is not packed into an archive")
    return sorted(found, key=lambda document: document.name)


def _sources(root: Path) -> Iterator[Document]:
    for path in root.rglob("*.py"):
        name = path.relative_to(root).as_posix()
        # `config-3.11-x86_64-linux-gnu` and `_sysconfigdata_...` describe the machine.
        if name in _LEFT_OUT_FILES or "config-" in name or name.startswith("_sysconfigdata"):
            continue
        if _LEFT_OUT_FOLDERS.intersection(PurePosixPath(name).parent.parts):
            continue
        try:
            with tokenize.open(path) as file:
                text = file.read()
        except (SyntaxError, UnicodeDecodeError):  # templates that a tool fills in
            continue
        if len(text) >= _SHORTEST:
            yield Document(name, text)


def _reference(root: Path) -> Iterator[Document]:
    """The topics of `help()`, read from their source without running it."""
    path = root / "pydoc_data" / "topics.py"
    if not path.is_file():
        return
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Dict):
            for topic, text in ast.literal_eval(node).items():
                if len(text) >= _SHORTEST:
                    yield Document(f"reference/{topic}", text.strip("\n") + "\n")
            return


def _shingles(text: str) -> set[int]:
    words = re.findall(r"\w+", text)
    return {crc32(" ".join(words[i : i + _SHINGLE]).encode()) for i in range(len(words) - _SHINGLE + 1)}


def _shared(document: Document, count: Counter[int]) -> float:
    own = _shingles(document.text)
    return sum(count[shingle] > 1 for shingle in own) / max(1, len(own))
