"""Prompts by category, cut out of documents: what language models are asked to go on with.

Which prompts there are, and their order, depends on the documents alone.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from zlib import crc32

from data.stdlib_text import Document, held_out_documents, training_documents

_LONGEST = 1000  # characters; with an answer it fits the context of the embedded models
_SHORTEST = 200
_DOCSTRING = 260  # characters of the shortest docstring that is asked to be continued
_EDITED = (240, 440)  # characters of a function that is shown once and asked for again
Function = ast.FunctionDef | ast.AsyncFunctionDef
Block = ast.Module | ast.ClassDef | Function


def held_out_prompts(category: str, count: int) -> list[str]:
    """Prompts to judge by, from documents that the embedded backbones never saw.

    Args:
        category: `code`, the middle of a function; `prose`, the middle of a docstring or of a reference page; `edit`, a
            function followed by the first line of a copy with one name changed.
    Raises:
        ValueError: no such category, or fewer prompts than asked for.
    """
    return prompts_of(held_out_documents(), category, count)


def seed_prompts(count: int) -> list[str]:
    """Prompts of all categories in turn, from the documents that the embedded backbones learned from."""
    found = _found(training_documents(), CATEGORIES)
    parts = [_chosen(found[category], category, -(-count // len(CATEGORIES))) for category in CATEGORIES]
    return [prompt for group in zip(*parts, strict=True) for prompt in group][:count]


def prompts_of(documents: Sequence[Document], category: str, count: int) -> list[str]:
    """`count` different prompts of a category, in an order that mixes the documents; see `held_out_prompts`."""
    if category not in _MAKERS:
        raise ValueError(f"the prompt category is '{category}', which is not one of {', '.join(CATEGORIES)}")
    return _chosen(_found(documents, [category])[category], category, count)


def _found(documents: Sequence[Document], categories: Sequence[str]) -> dict[str, dict[str, None]]:
    """All prompts of each category, once."""
    found: dict[str, dict[str, None]] = {category: {} for category in categories}
    for document in documents:
        blocks = _blocks(document)
        for category, prompts in found.items():
            prompts.update(dict.fromkeys(_MAKERS[category](document, blocks)))
    return found


def _chosen(found: Iterable[str], category: str, count: int) -> list[str]:
    ordered = sorted(found, key=lambda prompt: (crc32(prompt.encode()), prompt))
    if count > len(ordered):
        raise ValueError(f"{count} prompts of the category {category} are asked for, and there are {len(ordered)}")
    return ordered[:count]


def _code(document: Document, blocks: Sequence[Block]) -> Iterator[str]:
    """Up to a third into the body of every function that goes on for a while."""
    lines = document.text.splitlines(keepends=True)
    for node in _functions(blocks):
        body = node.body[1:] if ast.get_docstring(node) is not None else node.body
        if body and _end(node) - body[0].lineno >= 8:
            stop = body[0].lineno - 1 + (_end(node) - body[0].lineno) // 3
            yield from _ending(lines[:stop])


def _prose(document: Document, blocks: Sequence[Block]) -> Iterator[str]:
    """Up to a third into every long docstring, and through the paragraphs of a reference page."""
    if document.name.startswith("reference/"):
        paragraphs = re.split(r"(?<=\n)\n+", document.text)
        for number in range(1, len(paragraphs)):
            if len(paragraphs[number]) >= _SHORTEST:
                yield from _ending(_words("\n".join(paragraphs[:number]) + "\n", paragraphs[number], 3))
        return
    lines = document.text.splitlines(keepends=True)
    for node in blocks:
        if text := ast.get_docstring(node, clean=False):
            first = node.body[0]
            if len(text) >= _DOCSTRING:
                inside = "".join(lines[first.lineno - 1 : _end(first)])
                yield from _ending(_words("".join(lines[: first.lineno - 1]), inside, 3))


def _edit(document: Document, blocks: Sequence[Block]) -> Iterator[str]:
    """A function, and the first line of the same function in which its most used name is another."""
    lines = document.text.splitlines(keepends=True)
    for node in _functions(blocks):
        source = "".join(lines[node.lineno - 1 : _end(node)]).rstrip("\n")
        if not _EDITED[0] <= len(source) <= _EDITED[1]:
            continue
        uses = Counter(n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))
        uses.update(argument.arg for argument in node.args.args if argument.arg not in ("self", "cls"))
        names = {name: len(re.findall(rf"\b{re.escape(name)}\b", source)) for name in uses}
        name = max(names, key=lambda n: (names[n], n), default="")
        if names.get(name, 0) >= 3 and "new_" + name not in source:
            changed = re.sub(rf"\b{re.escape(name)}\b", "new_" + name, source)
            start = changed.partition("\n")[0]
            yield f"{source}\n\n# The same with {name} renamed to new_{name}:\n\n{start}\n"


def _functions(blocks: Sequence[Block]) -> Iterator[Function]:
    return (block for block in blocks if isinstance(block, Function))


def _blocks(document: Document) -> list[Block]:
    """What may have a docstring: the module, its classes and functions.  Of a reference page, nothing."""
    if document.name.startswith("reference/"):
        return []
    try:
        found: list[Block] = [ast.parse(document.text)]
    except SyntaxError:  # sources of another Python's grammar
        return []
    # Statements hold statements in these fields; looking into expressions would take most of the time.
    left: list[ast.AST] = list(found)
    while left:
        node = left.pop()
        for below in (getattr(node, field, ()) for field in ("body", "orelse", "finalbody", "handlers", "cases")):
            left += below
            found += [each for each in below if isinstance(each, ast.ClassDef | Function)]
    return found


def _end(node: ast.stmt) -> int:
    return node.end_lineno or node.lineno


def _words(before: str, text: str, parts: int) -> list[str]:
    """What stands before, and the first of some parts of a text, cut between two words."""
    cut = re.compile(r"\s").search(text, len(text) // parts)
    return [*before.splitlines(keepends=True), *text[: cut.start() if cut else len(text)].splitlines(keepends=True)]


def _ending(lines: Sequence[str]) -> Iterator[str]:
    """The last lines that make no more than the longest prompt, if they are enough of one."""
    chosen: list[str] = []
    for line in reversed(lines):
        if sum(map(len, chosen)) + len(line) > _LONGEST:
            break
        chosen.append(line)
    prompt = "".join(reversed(chosen)).lstrip("\n")
    if len(prompt) >= _SHORTEST:
        yield prompt


_Maker = Callable[[Document, Sequence[Block]], Iterator[str]]
_MAKERS: dict[str, _Maker] = {"code": _code, "prose": _prose, "edit": _edit}
CATEGORIES = tuple(_MAKERS)
