"""The standard library's text is the same everywhere, and what is held out is nowhere to be learned."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from data.prompts import CATEGORIES, held_out_prompts, prompts_of, seed_prompts
from data.stdlib_text import Document, all_documents, held_out_documents, split, training_documents

ROOT = Path(__file__).resolve().parents[1]
MARKER = ", in which every single word is an invention of its author's to be found in no other file at all"


def text_of(name: str, lines: int = 40) -> str:
    return "".join(f"{name} says {number} and {number + 1} of {name}{MARKER[:number]}\n" for number in range(lines))


def test_both_parts_hold_real_text_and_share_nothing() -> None:
    training, held_out = training_documents(), held_out_documents()
    assert len(training) > 300 and sum(len(d.text) for d in training) > 5_000_000
    assert len(held_out) > 20 and 0.03 < len(held_out) / len(training) < 0.15
    assert not {d.name for d in training} & {d.name for d in held_out}
    names = [d.name for d in all_documents()]
    assert names == sorted(names) and len(names) == len(training) + len(held_out)
    # Whole lines of more than a few words: hardly any of a held-out document stands in a training document.
    known = {line.strip() for d in training for line in d.text.splitlines() if len(line.split()) >= 8}
    for document in held_out:
        lines = [line.strip() for line in document.text.splitlines() if len(line.split()) >= 8]
        assert sum(line in known for line in lines) <= 0.12 * len(lines) + 1, document.name


def test_tests_demos_and_machine_files_are_left_out() -> None:
    names = {d.name for d in all_documents()}
    for part in ("/test/", "/idlelib/", "/turtledemo/", "/site-packages/", "_sysconfigdata", "config-3"):
        assert not [name for name in names if part in f"/{name}"]
    assert {"argparse.py", "json/decoder.py", "reference/for"} <= names


def test_the_parts_are_the_same_in_another_process_with_another_hash_seed() -> None:
    code = "from data.stdlib_text import *; print([d.name for d in held_out_documents()])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": "77"}, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    assert ast.literal_eval(done.stdout) == [d.name for d in held_out_documents()]


def test_what_is_chosen_does_not_depend_on_the_other_documents_unless_they_repeat_it() -> None:
    documents = [Document(f"m{number}.py", text_of(f"m{number}")) for number in range(200)]
    training, held_out = split(documents)
    assert 5 <= len(held_out) <= 30 and {*training, *held_out} == {*documents}
    assert split(documents[:100])[1] == tuple(d for d in documents[:100] if d in held_out)
    # A near copy of a held-out document anywhere makes it one to learn from.
    first = held_out[0]
    copy = Document("copy.py", first.text[len(first.text) // 3 :].replace(" 7 ", " seven "))
    assert first not in split([*documents, copy])[1]
    assert split([*documents, copy])[1] == held_out[1:]


@pytest.mark.parametrize("category", CATEGORIES)
def test_prompts_are_held_out_and_leave_room_for_an_answer(category: str) -> None:
    prompts = held_out_prompts(category, 60)
    assert len(set(prompts)) == 60 and prompts == held_out_prompts(category, 60)
    assert all(100 <= len(prompt) <= 1100 for prompt in prompts)
    texts = "\n".join(d.text for d in held_out_documents())
    for prompt in prompts[:20]:
        shown = prompt.partition("\n\n# The same with ")[0]
        assert shown in texts.replace("\n\n\n", "\n\n") or shown in texts
    with pytest.raises(ValueError, match=f"100000 prompts of the category {category} are asked for, and there are "):
        held_out_prompts(category, 100000)


def test_an_edit_shows_the_function_and_begins_its_copy() -> None:
    for prompt in held_out_prompts("edit", 20):
        shown, _, rest = prompt.partition("\n\n# The same with ")
        name, new = rest.split("\n")[0].removesuffix(":").split(" renamed to ")
        assert new == f"new_{name}" and shown.count(name) >= 3
        assert prompt.endswith(f"\n\n{rest.splitlines()[-1]}\n") and "def " in rest.splitlines()[-1]


def test_seed_prompts_take_turns_and_an_unknown_category_is_refused() -> None:
    prompts = seed_prompts(30)
    assert len(set(prompts)) == 30
    assert prompts[2::3] == prompts_of(training_documents(), "edit", 10)
    with pytest.raises(ValueError, match="the prompt category is 'poem', which is not one of code, prose, edit"):
        held_out_prompts("poem", 1)
