"""Blocks keep documents apart, records come from any file, and only what should be is learned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from data.records import held_out_records, read_records, tokenize, training_records
from data.text import IGNORED, Blocks, TokenDocument, TokenStream, WindowOrder, pack
from tests.tiny_language import tiny_llama, tiny_tokenizer

MARKED = (
    "{% for m in messages %}{{ '<' + m.role + '>' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '|' }}{% endgeneration %}"
    "{% else %}{{ m.content + '|' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
UNMARKED = (
    "{% for m in messages %}{{ '<' + m.role + '>' + m.content + '|' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
FORGETFUL = (
    "{% for m in messages %}{{ '<' + m.role + '>' + (m.content if loop.last else '') + '|' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
CHAT = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three"},
    {"role": "assistant", "content": "four"},
]


def documents(*lengths: int) -> list[TokenDocument]:
    """Documents of tokens that no other place has."""
    ids, found = iter(range(1, 1000)), []
    for length in lengths:
        found.append(TokenDocument([next(ids) for _ in range(length)], [True] * length))
    return found


def logits(model: LlamaForCausalLM, blocks: Blocks) -> torch.Tensor:
    return model(**blocks.model_inputs()).logits


# Blocks.


def test_every_token_is_packed_once_and_labels_cross_no_border() -> None:
    blocks = pack(documents(5, 9, 2), length=6, pad=0)
    assert blocks.input_ids.flatten().tolist() == [*range(1, 17), 0, 0]
    assert blocks.position_ids.tolist() == [[0, 1, 2, 3, 4, 0], [0, 1, 2, 3, 4, 5], [0, 1, 0, 1, 0, 1]]
    assert blocks.segments().tolist() == [[0, 0, 0, 0, 0, 1], [0] * 6, [0, 0, 1, 1, 2, 2]]
    # A document's first token is asked of nobody; its later ones are, also over a block's edge.
    opened = torch.tensor([1, 6, 15])
    learned = blocks.labels[blocks.labels != IGNORED].tolist()
    assert learned == [token for token in range(1, 17) if token not in opened]


def test_whole_documents_are_not_parted_and_fill_the_blocks() -> None:
    lengths = (3, 5, 8, 2, 7, 1, 12)
    blocks = pack(documents(*lengths), length=8, pad=0, whole=True)
    assert len(blocks) == 5  # 8 and the cut 12, 7+1, 5+3, 2
    rows = [row.tolist() for row in blocks.input_ids]
    for document in documents(*lengths):
        start = document.ids[:8]
        assert any(row[i : i + len(start)] == start for row in rows for i in range(8))


@torch.no_grad()
def test_a_packed_document_is_computed_as_if_it_were_alone() -> None:
    model, parts = tiny_llama(), documents(7, 5, 4)
    packed = logits(model, pack(parts, length=16, pad=0))[0].split([7, 5, 4])
    for part, want in zip(parts, packed, strict=True):
        alone = model(input_ids=torch.tensor([part.ids])).logits[0]
        torch.testing.assert_close(alone, want, rtol=1e-4, atol=1e-4)


def test_the_models_own_loss_is_that_of_the_labels() -> None:
    model, blocks = tiny_llama(), pack(documents(9, 7), length=8, pad=0)
    own = model(**blocks.model_inputs(), labels=blocks.labels).loss
    scores = logits(model, blocks)[:, :-1].log_softmax(-1)
    wanted = blocks.labels[:, 1:]
    known = wanted != IGNORED
    by_hand = -scores[known].gather(1, wanted[known][:, None]).mean()
    torch.testing.assert_close(own, by_hand)


def test_an_epoch_has_every_place_once_and_the_next_one_cuts_elsewhere() -> None:
    stream = TokenStream.of(documents(100))
    order = WindowOrder(stream, length=10, batch_size=3, seed=0)
    epochs = [torch.cat([order.batch(n).input_ids for n in range(first, first + 3)]) for first in (0, 3)]
    for ids in epochs:
        assert len(set(ids.flatten().tolist())) == 90
        assert (ids.diff(dim=1) == 1).all()
    assert {int(i) % 10 for i in epochs[0][:, 0]} != {int(i) % 10 for i in epochs[1][:, 0]}
    assert torch.equal(WindowOrder(stream, 10, 3, seed=0).batch(4).input_ids, order.batch(4).input_ids)
    with pytest.raises(ValueError, match="100 tokens hold no two blocks of 60: give more text"):
        WindowOrder(stream, length=60, batch_size=1, seed=0).batch(0)


def test_nothing_to_pack_is_refused() -> None:
    with pytest.raises(ValueError, match="all documents are empty"):
        pack(documents(0), length=4, pad=0)


# What is learned.


def learned_text(document: TokenDocument) -> str:
    pairs = zip(document.ids, document.learned, strict=True)
    return tiny_tokenizer().decode([token for token, learned in pairs if learned])


def test_a_text_is_learned_with_its_end_and_of_an_answer_the_prompt_is_not() -> None:
    tokenizer = tiny_tokenizer()
    assert learned_text(tokenize({"text": "a\u20ac"}, tokenizer)) == "a\u20ac<|endoftext|>"
    answer = tokenize({"prompt": "ask", "response": "say"}, tokenizer)
    assert learned_text(answer) == "say<|endoftext|>" and tokenizer.decode(answer.ids) == "asksay<|endoftext|>"
    cut = tokenize({"prompt": "ask", "response": "say", "finished": False}, tokenizer)
    assert learned_text(cut) == "say"
    with pytest.raises(ValueError, match="a prompt without a response is nothing to learn from"):
        tokenize({"prompt": "ask"}, tokenizer)


@pytest.mark.parametrize("template", [MARKED, UNMARKED])
def test_of_a_conversation_only_the_assistant_is_learned(template: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    document = tokenize({"messages": CHAT}, tokenizer)
    assert tokenizer.decode(document.ids) == "<user>one|<assistant>two|<user>three|<assistant>four|"
    assert learned_text(document) == "two|four|"


def test_templates_that_hide_the_assistant_are_refused() -> None:
    tokenizer = tiny_tokenizer()
    with pytest.raises(ValueError, match="has no chat template, which `messages` need"):
        tokenize({"messages": CHAT}, tokenizer)
    tokenizer.chat_template = FORGETFUL
    with pytest.raises(ValueError, match="rewrites earlier turns"):
        tokenize({"messages": CHAT}, tokenizer)


# Reading.


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def test_every_kind_of_file_is_read(tmp_path: Path) -> None:
    rows = [{"text": "line\u2028separator"}, {"prompt": "p", "response": "r", "extra": 1}, {"messages": CHAT}]
    want = [rows[0], {"prompt": "p", "response": "r"}, rows[2]]
    path = write_lines(tmp_path / "a.jsonl", rows)
    assert read_records(str(path)) == want
    (tmp_path / "b.txt").write_text("plain\n", encoding="utf-8")
    shared = [{"conversations": [{"from": "human", "value": "one"}, {"from": "gpt", "value": "two"}]}]
    (tmp_path / "c.json").write_text(json.dumps(shared))
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    assert read_records(str(tmp_path)) == [*want, {"text": "plain\n"}, {"messages": CHAT[:2]}]


def test_what_datasets_saved_is_read(tmp_path: Path) -> None:
    from datasets import Dataset

    rows = [{"text": f"row {i}"} for i in range(4)]
    Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    (tmp_path / "parquet").mkdir()
    Dataset.from_list(rows).to_parquet(tmp_path / "parquet" / "part.parquet")
    for source in ("saved", "parquet", "parquet/part.parquet"):
        assert read_records(str(tmp_path / source)) == rows


def test_the_held_out_records_are_a_twentieth_and_none_of_the_others(tmp_path: Path) -> None:
    path = str(write_lines(tmp_path / "a.jsonl", [{"text": f"text {i}"} for i in range(2000)]))
    training, held_out = training_records(path), held_out_records(path)
    assert 60 <= len(held_out) <= 140
    assert sorted(r["text"] for r in [*training, *held_out]) == sorted(f"text {i}" for i in range(2000))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"text": \n', "line 2 of PATH is not JSON: Expecting value"),
        (b"[1]\n", "line 1 of PATH is no object with `text`, `prompt` and `response`, or `messages`"),
        (
            b'{"body": "a"}\n',
            "line 1 of PATH has the keys body but needs `text`, `prompt` and `response`, or `messages`",
        ),
        (b'{"messages": [{"role": "user"}]}\n', "line 1 of PATH has a message without a role and a text"),
        (b"\xff\n", "PATH is not UTF-8 text: byte 0 cannot be read"),
        (b"\n", "data.path PATH holds no records"),
    ],
)
def test_what_cannot_be_read_is_refused_in_a_sentence(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=".") as caught:
        read_records(str(path))
    assert str(caught.value) == message.replace("PATH", str(path))


def test_missing_files_and_useless_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no such file or folder"):
        read_records(str(tmp_path / "none.jsonl"))
    with pytest.raises(ValueError, match=r"holds no \.txt, \.md, \.rst, \.py, \.jsonl, \.json or \.parquet file"):
        read_records(str(tmp_path))
