"""The command that makes `embedded:needle` resumes, and what is shipped looks needles up as its card says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from data.needle import VOCABULARY, needle_rows, words
from modules.embedded import EMBEDDED_FOLDER
from modules.language_models import load_model
from trainers.backbones import __main__ as command
from trainers.backbones import needle
from trainers.backbones.needle import Stage, accuracy, needle_tokenizer, train_needle

SHORT = (Stage("copy", (16,), 64, 4), Stage("needle", (40, 60), 120, 5, 2.0))


def test_a_killed_training_goes_on_to_the_same_weights(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(needle, "_SAVE", 2)
    whole = train_needle(tmp_path / "whole.pt", SHORT).state_dict()
    asked, batch = [], needle._batch

    def killed(stage: Stage, number: int, step: int) -> Any:
        asked.append((number, step))
        if len(asked) == 8:
            raise KeyboardInterrupt
        return batch(stage, number, step)

    monkeypatch.setattr(needle, "_batch", killed)
    with pytest.raises(KeyboardInterrupt):
        train_needle(tmp_path / "parted.pt", SHORT)
    parted = train_needle(tmp_path / "parted.pt", SHORT).state_dict()
    first = [(0, step) for step in range(4)] + [(1, step) for step in range(4)]
    assert asked == [*first, (1, 2), (1, 3), (1, 4)]
    assert all(torch.equal(parted[name], tensor) for name, tensor in whole.items())


def test_a_stage_ends_when_it_is_good_enough(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(needle, "_step", lambda *_: (0.0, 1.0))
    steps: list[int] = []
    batch = needle._batch
    monkeypatch.setattr(
        needle, "_batch", lambda stage, number, step: steps.append(number) or batch(stage, number, step)
    )
    train_needle(tmp_path / "state.pt", SHORT)
    assert steps == [0, 1, 1, 1, 1, 1]


def test_tokens_are_words() -> None:
    tokenizer = needle_tokenizer()
    assert len(tokenizer) == VOCABULARY == len(set(words()))
    ids = needle_rows(1, 40, torch.Generator().manual_seed(0)).input_ids[0].tolist()
    text = tokenizer.decode(ids)
    assert re.search(r"marker\d key\d+ value\d+", text) and text.endswith(tokenizer.decode(ids[-1:]))
    assert tokenizer(text).input_ids == ids


def test_the_command_names_it(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    made: list[Path] = []
    monkeypatch.setattr(command, "publish_needle", made.append)
    assert command.main(["needle", f"out={tmp_path / 'new'}"]) == 0 and made == [tmp_path / "new"]
    assert command.main(["needle", f"out={tmp_path / 'new'}", "minutes=3"]) == 2
    assert "usage" in capsys.readouterr().err


def test_what_is_shipped_is_what_its_card_says() -> None:
    card = (EMBEDDED_FOLDER / "needle" / "README.md").read_text(encoding="utf-8")
    stated = dict(re.findall(r"after (\d+) tokens of noise with 8 needles \| ([\d.]+)% \|", card))
    assert set(stated) == {"256", "512", "1024", "2024"} and all(float(share) > 97 for share in stated.values())
    model, _ = load_model("embedded:needle")
    assert sum(parameter.numel() for parameter in model.parameters()) < 120_000
    for context in (256, 512):
        assert 100 * accuracy(model, context) == pytest.approx(float(stated[str(context)]), abs=0.05)
