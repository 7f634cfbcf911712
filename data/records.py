"""Texts, conversations and answered prompts from local files, and their tokens with what is to be learned marked.

A record is a dict with `text`; with `prompt` and `response`, the latter missing where it is still to be answered; or
with `messages` (transformers' chat format; the `conversations` of ShareGPT files are read as such).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from zlib import crc32

from transformers import PreTrainedTokenizerBase

from data.stdlib_text import Document, held_out_documents, training_documents
from data.text import TokenDocument

Record = dict[str, Any]
STDLIB = "stdlib"
TEXT_ENDINGS = (".txt", ".md", ".rst", ".py")
_FORMS = "`text`, `prompt` and `response`, or `messages`"
_HELD_OUT_OF_100 = 5
_ROLES = {"human": "user", "gpt": "assistant"}


def training_records(source: str) -> list[Record]:
    """What may be learned from; see `read_records`."""
    if source == STDLIB:
        return _of_documents(training_documents())
    return [record for record in read_records(source) if not _is_held_out(record)]


def held_out_records(source: str) -> list[Record]:
    """What is kept apart to judge by: about one record in twenty, chosen by a hash of its content."""
    if source == STDLIB:
        return _of_documents(held_out_documents())
    return [record for record in read_records(source) if _is_held_out(record)]


def read_records(source: str) -> list[Record]:
    """Every record of a source, in the order of file names and of lines.

    Args:
        source: `stdlib`; a text file, which is one record; a .jsonl file, or a .json file with a list; a folder of
            these; a folder that `datasets` saved, or one of Parquet files; or a Hub id.
    Raises:
        ValueError: nothing there can be read, or a record has none of the forms.
    """
    if source == STDLIB:
        return _of_documents((*training_documents(), *held_out_documents()))
    path = Path(source)
    if path.is_file():
        records = list(_read_file(path))
    elif path.is_dir():
        records = _read_folder(path)
    elif path.suffix or source.startswith((".", "/", "~")):
        raise ValueError(f"data.path is '{source}', and there is no such file or folder")
    else:
        records = list(_from_datasets(source))
    if not records:
        raise ValueError(f"data.path {source} holds no records")
    return records


def tokenize(record: Record, tokenizer: PreTrainedTokenizerBase) -> TokenDocument:
    """The record's tokens; of conversations the assistant's, and of answered prompts the answer's, are to be learned.

    Raises:
        ValueError: the record has no answer, or the tokenizer no chat template that tells the assistant's tokens.
    """
    if "messages" in record:
        return _conversation(record["messages"], tokenizer, record.get("finished", True))
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if "text" in record:
        ids = _ids(record["text"], tokenizer)
        return TokenDocument([*ids, *end], [True] * (len(ids) + len(end)))
    if "response" not in record:
        raise ValueError("a prompt without a response is nothing to learn from: answer it with trainers.distill")
    prompt, response = (_ids(record[part], tokenizer) for part in ("prompt", "response"))
    response += end if record.get("finished", True) else []
    return TokenDocument([*prompt, *response], [False] * len(prompt) + [True] * len(response))


def _ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    # Texts longer than the context are cut into blocks later; `verbose` would warn of each.
    return list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def _conversation(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, finished: bool) -> TokenDocument:
    """A template that marks the assistant's turns is asked for them; of any other, every turn's tokens are compared."""
    if tokenizer.chat_template is None:
        raise ValueError(f"the tokenizer {tokenizer.name_or_path} has no chat template, which `messages` need")
    if not finished:  # the template would close the turn where its speaker was cut off
        before = _turns(messages[:-1], tokenizer, add_generation_prompt=True)
        answer = _ids(messages[-1]["content"], tokenizer)
        return TokenDocument([*before, *answer], [False] * len(before) + [True] * len(answer))
    if re.search(r"\{%-?\s*generation\b", str(tokenizer.chat_template)):
        encoded = tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return TokenDocument(list(encoded["input_ids"]), [bool(mark) for mark in encoded["assistant_masks"]])
    ids = _turns(messages, tokenizer)
    learned = [False] * len(ids)
    for turn, message in enumerate(messages):
        if message["role"] == "assistant":
            before = _turns(messages[:turn], tokenizer, add_generation_prompt=True)
            after = _turns(messages[: turn + 1], tokenizer)
            if ids[: len(after)] != after or after[: len(before)] != before:
                raise ValueError(
                    f"the chat template of {tokenizer.name_or_path} rewrites earlier turns, so the assistant's tokens "
                    "cannot be found: give it a template with {% generation %} marks"
                )
            learned[len(before) : len(after)] = [True] * (len(after) - len(before))
    return TokenDocument(ids, learned)


def _turns(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, **options: bool) -> list[int]:
    if not messages:
        return []
    return list(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)["input_ids"])


def _of_documents(documents: Sequence[Document]) -> list[Record]:
    return [{"text": document.text} for document in documents]


def _is_held_out(record: Record) -> bool:
    return crc32(json.dumps(record, sort_keys=True, default=str).encode()) % 100 < _HELD_OUT_OF_100


def _read_folder(folder: Path) -> list[Record]:
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file() or any(folder.rglob("*.parquet")):
        return list(_from_datasets(str(folder)))
    endings = (*TEXT_ENDINGS, ".jsonl", ".json")
    visible = (path for path in folder.rglob("*") if not path.name.startswith("."))
    paths = sorted(path for path in visible if path.suffix in endings)
    if not paths:
        raise ValueError(f"the folder {folder} holds no {', '.join(endings)} or .parquet file")
    return [record for path in paths for record in _read_file(path)]


def _read_file(path: Path) -> Iterator[Record]:
    if path.suffix == ".parquet":
        yield from _from_datasets(str(path))
        return
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: byte {error.start} cannot be read") from None
    if path.suffix == ".jsonl":
        # Not splitlines(): JSON strings may hold line separators that are none here.
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                place = f"line {number} of {path}"
                yield _record(_parsed(line, place), place)
    elif path.suffix == ".json":
        rows = _parsed(text, str(path))
        if not isinstance(rows, list):
            raise ValueError(f"{path} holds no list of records")
        for number, row in enumerate(rows, start=1):
            yield _record(row, f"record {number} of {path}")
    elif text.strip():
        yield {"text": text}


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place} is not JSON: {error.msg}") from None


def _from_datasets(source: str) -> Iterator[Record]:
    from datasets import DatasetDict, load_dataset, load_from_disk

    folder = Path(source)
    try:
        if folder.is_file():
            rows = load_dataset("parquet", data_files=source, split="train")
        elif any(folder.rglob("*.parquet")):
            rows = load_dataset("parquet", data_dir=source, split="train")
        else:
            rows = load_from_disk(source) if folder.is_dir() else load_dataset(source, split="train")
    except Exception as error:  # datasets raises its own classes, OSError, ValueError and more for what cannot be read
        raise ValueError(f"data.path {source} cannot be read by datasets: {' '.join(str(error).split())}") from error
    if isinstance(rows, DatasetDict):
        if "train" not in rows:
            raise ValueError(f"data.path {source} has the splits {', '.join(rows)} but needs one named train")
        rows = rows["train"]
    for number, row in enumerate(rows, start=1):
        yield _record(row, f"row {number} of {source}")


def _record(row: Any, place: str) -> Record:
    if not isinstance(row, dict):
        raise ValueError(f"{place} is no object with {_FORMS}")
    if isinstance(turns := row.get("messages") or row.get("conversations"), list):
        cut = {"finished": False} if row.get("finished") is False else {}
        return {"messages": [_message(turn, place) for turn in turns], **cut}
    if isinstance(row.get("prompt"), str):
        return {name: row[name] for name in ("prompt", "response", "finished") if row.get(name) is not None}
    if isinstance(row.get("text"), str):
        return {"text": row["text"]}
    raise ValueError(f"{place} has the keys {', '.join(map(str, row)) or 'none'} but needs {_FORMS}")


def _message(turn: Any, place: str) -> dict[str, str]:
    if isinstance(turn, dict):
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if isinstance(role, str) and isinstance(content, str):
            return {"role": _ROLES.get(role, role), "content": content}
    raise ValueError(f"{place} has a message without a role and a text")
