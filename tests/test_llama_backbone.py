"""The command that makes `embedded:llama` works and resumes, and what is shipped is what its card says."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from data.stdlib_text import Document, held_out_documents
from data.text import TokenDocument, TokenStream, WindowOrder
from modules.embedded import EMBEDDED_FOLDER
from modules.language_models import load_model
from tests.tiny_language import tiny_llama, tiny_tokenizer
from trainers.backbones import __main__ as command
from trainers.backbones import language, loops
from trainers.backbones.language import Recipe, build_model, rate, stream_of, train, train_tokenizer
from trainers.text_quality import TextQuality, greedy_continuations, measure_text, repeated_share

TINY = Recipe(
    minutes=1, hidden_size=16, intermediate_size=32, layers=2, heads=2, key_value_heads=1, tokens_a_step=512, rows=512
)
STRANGE = "\x00\x07\r\n\t  \u00a0\ufeff\u2028\u20ac\U0001f600 def f(x):\r\n\t\treturn  x\x7f<|endof text|>\n\n\n    "


def text(lines: int) -> str:
    chosen = random.Random(0)
    return "".join(f"{chosen.choice('abcdef')} = {chosen.choice('uvwxyz')}\n" for _ in range(lines))


def tiny_stream() -> TokenStream:
    return stream_of([Document("a", text(600)), Document("b", text(300))], tiny_tokenizer())


class Clock:
    """Two seconds pass between two looks."""

    def __init__(self) -> None:
        self.now = 0.0

    def process_time(self) -> float:
        self.now += 2.0
        return self.now


# Tokenizer.


def test_the_tokenizer_loses_nothing_and_knows_its_text() -> None:
    tokenizer = train_tokenizer([text(2000), "the quick brown fox " * 100], 281)
    assert len(tokenizer) == 281
    chosen = random.Random(1)
    anything = "".join(chr(c) for c in chosen.choices([*range(0xD800), *range(0xE000, 0x110000)], k=3000))
    for sample in (STRANGE, anything, ""):
        assert tokenizer.decode(tokenizer(sample).input_ids) == sample
    assert len(tokenizer("the quick brown fox").input_ids) == 4
    assert tokenizer.eos_token_id == 0 and tokenizer.pad_token_id == 1


# Training.


def test_the_learning_rate_warms_up_and_ends_at_zero() -> None:
    rates = [rate(progress / 100, TINY) for progress in range(101)]
    assert rates[0] < 0.1 and rates[5:31] == [1.0] * 26 and rates[100] == 0
    assert all(earlier >= later for earlier, later in zip(rates[30:], rates[31:], strict=False))


def test_a_killed_training_goes_on_to_the_same_weights(tmp_path: Path, monkeypatch: Any) -> None:
    def trained(state: Path) -> dict[str, torch.Tensor]:
        monkeypatch.setattr(language, "time", Clock())
        model = train("tiny", build_model(TINY, tiny_tokenizer()), tiny_stream(), TINY, state)
        return {name: tensor.clone() for name, tensor in model.state_dict().items()}

    monkeypatch.setattr(language, "SAVE_SECONDS", 20)
    whole = trained(tmp_path / "whole.pt")
    batch, asked = WindowOrder.batch, []

    def killed(self: WindowOrder, number: int) -> Any:
        asked.append(number)
        if len(asked) == 16:
            raise KeyboardInterrupt
        return batch(self, number)

    monkeypatch.setattr(WindowOrder, "batch", killed)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "parted.pt")
    parted = trained(tmp_path / "parted.pt")
    assert asked == [*range(16), *range(10, 30)]
    assert all(torch.equal(parted[name], tensor) for name, tensor in whole.items())
    # A finished one is not trained again.
    assert all(torch.equal(tensor, whole[name]) for name, tensor in trained(tmp_path / "whole.pt").items())
    assert len(asked) == 36


def test_training_learns_the_text(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(language, "time", Clock())
    stream, model = tiny_stream(), build_model(TINY, tiny_tokenizer())
    size = len(text(600) + text(300))
    before = measure_text(model, stream, size, 256)
    recipe = replace(TINY, minutes=6, other_lr=2e-2)
    after = measure_text(train("tiny", model, stream, recipe, tmp_path / "state.pt"), stream, size, 256)
    # log2(258) bits a token before; afterwards letters are drawn from 6 in 2 of 6 bytes: 0.86 bits a byte at best.
    assert before.bits_per_byte > 7.9 and after.bits_per_byte < 1.6 and after.top1 > 0.6


def test_a_loss_that_is_not_finite_stops_the_training(tmp_path: Path) -> None:
    model = build_model(TINY, tiny_tokenizer())
    model.model.norm.weight.data[0] = float("nan")
    with pytest.raises(ValueError, match="tiny: the loss of step 0 is nan: remove"):
        train("tiny", model, tiny_stream(), TINY, tmp_path / "state.pt")
    assert not (tmp_path / "state.pt").exists()


# Measures.


@torch.no_grad()
def test_bits_per_byte_are_those_of_the_tokens_alone() -> None:
    model, ids = tiny_llama(), list(range(2, 90))
    stream = TokenStream.of([TokenDocument(ids, [True] * len(ids))])
    scores = model(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    bits = -scores.gather(1, torch.tensor(ids[1:])[:, None]).sum() / torch.log(torch.tensor(2.0))
    want = TextQuality(float(bits) / 87, float((scores.argmax(-1) == torch.tensor(ids[1:])).float().mean()))
    got = measure_text(model, stream, text_bytes=88, length=128)
    assert (got.bits_per_byte, got.top1) == pytest.approx((want.bits_per_byte, want.top1), rel=1e-4)


def test_repeated_trigrams_are_counted_within_a_sequence() -> None:
    assert repeated_share([[1, 2, 3, 4, 5]]) == 0 and repeated_share([[1, 2]]) == 0
    assert repeated_share([[1, 2, 3, 1, 2, 3]]) == 1 / 4
    assert repeated_share([[1, 2, 3], [1, 2, 3]]) == 0
    assert repeated_share([[7] * 12]) == 9 / 10


def test_unlikelihood_pushes_down_repeated_tokens_the_doubted_ones_most_and_nothing_else() -> None:
    logits = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0))
    logits[0, 1, 2] = 12.0
    logits.requires_grad_()
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    repeated = torch.tensor([[False, True, False], [False, False, True]])
    loss = loops.unlikelihood(logits, ids, repeated)
    doubt = 1 - logits.softmax(-1)[repeated].gather(1, ids[repeated][:, None]).squeeze(1)
    torch.testing.assert_close(loss, (-doubt.log() * doubt).sum() / doubt.sum(), rtol=1e-3, atol=1e-3)
    loss.backward()
    assert (logits.grad[~repeated] == 0).all()
    pushed = logits.grad[repeated]  # descent lowers what has a positive gradient: the repeated token alone
    assert torch.equal(pushed > 0, torch.nn.functional.one_hot(ids[repeated], 7).bool())
    assert pushed[0].max() < 0.01 * pushed[1].max()
    assert loops.unlikelihood(logits, ids, torch.zeros_like(repeated)) == 0


def test_the_phase_against_loops_lowers_their_chance_and_the_anchor_holds_the_rest(tmp_path: Path) -> None:
    stream, chances, drifts = tiny_stream(), [], []
    for steps, anchor in ((0, 0.0), (3, 0.0), (3, 100.0)):
        model = build_model(TINY, tiny_tokenizer())
        model.model.embed_tokens.weight.data *= 25  # untrained, it says its last token again and again
        prompts = stream.windows(torch.arange(4), 96).input_ids
        said = torch.tensor(greedy_continuations(model, prompts, 96))
        with torch.no_grad():
            was = model(input_ids=prompts).logits
        loops.unlearn_loops(model, stream, tmp_path / "state.pt", steps=steps, lr=2e-2, rows=4, anchor=anchor)
        with torch.no_grad():
            scores = model(input_ids=torch.cat([prompts, said], 1)).logits[:, 95:-1].log_softmax(-1)
            drifts.append(float(loops.divergence(was, model(input_ids=prompts).logits)))
        chances.append(float(scores.gather(2, said[:, :, None]).exp().mean()))
    assert chances[1] < 0.9 * chances[0]
    assert abs(drifts[0]) < 1e-5 and 0 < drifts[2] < 0.5 * drifts[1]


def test_a_token_loops_where_it_closes_six_that_were_said_before() -> None:
    said = [1, 2, 3, 4, 5, 6, 1, 2, 3, 4, 5, 6, 9]
    assert [i for i, mark in enumerate(loops._looping([7] * 5, said)) if mark] == [11]
    assert [i for i, mark in enumerate(loops._looping([8] * 5, [4] * 8)) if mark] == [6, 7]


# The command.


@pytest.mark.parametrize(
    "argv", [[], ["lama", "out=x"], ["llama"], ["llama", "out=x", "minutes=none"], ["dit", "out=x", "minutes=3"]]
)
def test_a_wrong_command_is_told_its_usage(argv: list[str], capsys: Any) -> None:
    assert command.main(argv) == 2
    assert capsys.readouterr().err.startswith(
        "usage: python -m trainers.backbones {pixart,dit,llama,needle} out=FOLDER"
    )


# What is shipped.


def card_number(name: str, row: str) -> float:
    card = (EMBEDDED_FOLDER / name / "README.md").read_text(encoding="utf-8")
    found = re.search(rf"\| {re.escape(row)} \| ([\d.]+)(%?)", card)
    assert found is not None, row
    return float(found[1]) / (100 if found[2] else 1)


@pytest.mark.parametrize(("name", "layers", "least"), [("llama", 6, 5e6), ("llama_draft", 1, 3e5)])
def test_the_shipped_model_is_small_and_loads_in_float32(name: str, layers: int, least: float) -> None:
    folder = EMBEDDED_FOLDER / name
    assert (folder / "model.safetensors").stat().st_size < 14e6
    model, tokenizer = load_model(f"embedded:{name}")
    assert model.dtype == torch.float32 and model.config.num_hidden_layers >= layers
    assert least < sum(parameter.numel() for parameter in model.parameters()) < 2 * 5e6
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.float32
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    assert tokenizer.decode(tokenizer(STRANGE).input_ids) == STRANGE
    assert len(tokenizer) == model.config.vocab_size and tokenizer.padding_side == "left"


def test_the_draft_has_the_same_tokens() -> None:
    parts = [(EMBEDDED_FOLDER / name / "tokenizer.json").read_bytes() for name in ("llama", "llama_draft")]
    assert parts[0] == parts[1]


@pytest.mark.parametrize("name", ["llama", "llama_draft"])
def test_the_shipped_model_predicts_held_out_text_as_its_card_says(name: str) -> None:
    model, tokenizer = load_model(f"embedded:{name}")
    few = [document for document in held_out_documents() if 2000 < len(document.text) < 11000][:12]
    stream = stream_of(few, tokenizer)
    got = measure_text(model, stream, sum(len(document.text.encode()) for document in few), 512)
    assert got.bits_per_byte < 1.15 * card_number(name, "held-out bits per byte")
    assert got.top1 > 0.9 * card_number(name, "held-out tokens that are its first choice")


def test_the_embedded_backbones_stay_small() -> None:
    assert sum(path.stat().st_size for path in EMBEDDED_FOLDER.rglob("*") if path.is_file()) < 40e6
