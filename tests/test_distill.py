"""A backbone answers prompts the same way however often it is stopped; recorded states are the model's own."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from checkpoints.manifest import fingerprint
from data.answers import Answerer, Sampling, SeededChoice
from data.recorded import RecordedStates, record_states
from data.records import read_records, tokenize
from data.text import TokenDocument, pack
from modules.medusa.output_layer import features
from tests.tiny_language import save_tiny_llama, tiny_llama, tiny_tokenizer
from trainers import distill

CHAT = (
    "{% for m in messages %}{{ '<' + m.role + '>' + m.content + '|' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
PROMPTS = ["import os", "a", "def f(x):", "class Longer:", "x = 1", "for", "'''text"]


def talking_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT
    return tokenizer


def arguments(tmp_path: Path, output: str, **settings: Any) -> list[str]:
    folder = tmp_path / "model"
    if not folder.exists():
        save_tiny_llama(folder)
        (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    given: dict[str, Any] = {
        "backbone.name": folder, "prompts": tmp_path / "prompts.txt", "output": tmp_path / output,
        "max_new_tokens": 12, "batch_size": 2, "temperature": 1.0, **settings,
    }  # fmt: skip
    return [f"{key}={value}" for key, value in given.items()]


def answers(folder: Path) -> str:
    return "".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.jsonl")))


# Answers.


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_answer_is_a_function_of_its_prompt_and_seed_not_of_its_neighbours(temperature: float) -> None:
    answerer = Answerer(tiny_llama(), tiny_tokenizer(), Sampling(max_new_tokens=16, temperature=temperature))
    prompts = [{"prompt": prompt} for prompt in PROMPTS]
    together = answerer.answer(prompts, range(len(prompts)))
    alone = [answerer.answer([prompt], [seed])[0] for seed, prompt in enumerate(prompts)]
    assert together == alone
    assert len({record["response"] for record in together}) == len(PROMPTS)
    others = answerer.answer(prompts, range(100, 100 + len(prompts)))
    assert (others == together) == (temperature == 0)


def test_the_seeded_choice_samples_the_softmax() -> None:
    scores, draws = torch.tensor([[2.0, 0.0, -1.0, float("-inf")]]), 4000
    choice = SeededChoice([0] * 2 + [7], torch.device("cpu"))
    first = choice(torch.empty(0), scores.expand(3, -1)).argmax(1)
    assert first[0] == first[1]
    many = SeededChoice(range(draws), torch.device("cpu"))(torch.empty(0), scores.expand(draws, -1)).argmax(1)
    share = torch.bincount(many, minlength=4) / draws
    torch.testing.assert_close(share, scores.softmax(1)[0], atol=0.03, rtol=0)


def test_without_temperature_the_answer_is_generates_own_and_finished_tells_how_it_ended() -> None:
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    ids = tokenizer("import os", return_tensors="pt").input_ids
    own = model.generate(ids, max_new_tokens=20, do_sample=False)[0, ids.shape[1] :].tolist()
    answerer = Answerer(model, tokenizer, Sampling(max_new_tokens=20, temperature=0))
    got = answerer.answer([{"prompt": "import os"}], [0])[0]
    assert got == {
        "prompt": "import os", "response": tokenizer.decode(own, skip_special_tokens=True).rstrip("\ufffd"),
        "finished": False,
    }  # fmt: skip
    # The fifth token of that answer as the end token: the answer has four.
    model.generation_config.eos_token_id = own[4]
    ended = answerer.answer([{"prompt": "import os"}], [0])[0]
    assert ended["finished"] and ended["response"] == tokenizer.decode(own[: own.index(own[4])])


def test_a_conversation_goes_on_with_the_models_own_turns() -> None:
    model, tokenizer = tiny_llama(), talking_tokenizer()
    model.generation_config.eos_token_id = list(range(2, 250, 3))
    answerer = Answerer(model, tokenizer, Sampling(max_new_tokens=30, temperature=0))
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "not mine"}]
    got = answerer.answer([{"messages": [*said, {"role": "user", "content": "b"}]}], [0])[0]["messages"]
    assert [message["role"] for message in got] == ["user", "assistant", "user", "assistant"]
    assert [message["content"] for message in got][::2] == ["a", "b"] and "not mine" not in str(got)
    ids = tokenizer.apply_chat_template(got[:3], add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**ids, max_new_tokens=30, do_sample=False)[0, ids["input_ids"].shape[1] : -1]
    assert got[3]["content"] == tokenizer.decode(out, skip_special_tokens=True)


def test_a_cut_turn_is_learned_without_the_templates_ending() -> None:
    tokenizer = talking_tokenizer()
    record = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "bc"}], "finished": False}
    document = tokenize(record, tokenizer)
    assert tokenizer.decode(document.ids) == "<user>a|<assistant>bc"
    assert document.learned == [False] * (len(document) - 2) + [True] * 2


# The command.


def test_a_killed_command_goes_on_and_ends_with_the_same_answers(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    assert distill.main(arguments(tmp_path, "whole")) == 0
    shown = capsys.readouterr().out
    assert re.search(r"(?m)^7 prompts, at most about \d+\.\d MiB of answers in", shown)
    answer, asked = Answerer.answer, []

    def killed(self: Answerer, prompts: Any, seeds: Any) -> Any:
        asked.append([prompt["prompt"] for prompt in prompts])
        if len(asked) == 3:
            raise KeyboardInterrupt
        return answer(self, prompts, seeds)

    monkeypatch.setattr(Answerer, "answer", killed)
    with pytest.raises(KeyboardInterrupt):
        distill.main(arguments(tmp_path, "parted"))
    assert len(read_records(str(tmp_path / "parted"))) == 4
    assert distill.main(arguments(tmp_path, "parted")) == 0
    tokenizer = tiny_tokenizer()
    ordered = sorted(PROMPTS, key=lambda prompt: len(tokenizer(prompt).input_ids))  # near lengths share a batch
    assert asked == [ordered[0:2], ordered[2:4], ordered[4:6], ordered[4:6], ordered[6:]]
    assert answers(tmp_path / "parted") == answers(tmp_path / "whole")
    records = read_records(str(tmp_path / "parted"))
    assert [record["prompt"] for record in records] == ordered and all("response" in record for record in records)


def test_a_folder_begun_otherwise_is_refused_by_the_differing_setting(tmp_path: Path, capsys: Any) -> None:
    assert distill.main(arguments(tmp_path, "out")) == 0
    before = answers(tmp_path / "out")
    assert distill.main(arguments(tmp_path, "out", temperature=0.5, seed=3)) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and "was begun with other settings of temperature, seed: repeat them" in error
    assert answers(tmp_path / "out") == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    assert distill.main(arguments(tmp_path, "mine")) == 1
    assert "holds other files" in capsys.readouterr().err


def test_prompts_without_room_are_left_out_and_records_are_asked_as_they_are(tmp_path: Path, capsys: Any) -> None:
    given = arguments(tmp_path, "out")
    rows: list[Any] = [{"prompt": "y" * 150}, {"prompt": "short", "response": "old"}, {"prompt": ""}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = [*given, f"prompts={path}"]
    assert distill.main(given) == 0
    assert "2 prompts are left out" in capsys.readouterr().out
    record = read_records(str(tmp_path / "out"))[0]
    assert record["prompt"] == "short" and record["response"] != "old"
    assert distill.main([*given, f"output={tmp_path / 'none'}", "max_new_tokens=128"]) == 1
    assert "context of 128 tokens must hold the prompt as well" in capsys.readouterr().err
    path.write_text('{"text": "no prompt"}\n')
    assert distill.main([*given, f"output={tmp_path / 'none'}"]) == 1
    assert "has no prompts" in capsys.readouterr().err and not (tmp_path / "none").exists()


# Recorded states.


def recording(tmp_path: Path, **settings: Any) -> tuple[Any, Any, RecordedStates]:
    model = tiny_llama()
    documents = [TokenDocument(list(range(2, 2 + n)), [True] * n) for n in (40, 25, 70, 9)]
    blocks = pack(documents, length=16, pad=1)
    states = record_states(model, blocks, tmp_path / "states", fingerprint=fingerprint(model), batch_size=2, **settings)
    return model, blocks, states


@torch.no_grad()
def test_recorded_states_are_the_models_own_and_are_read_by_number(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("data.recorded._FILE_BYTES", 3 * 16 * (32 * 4 + 24))
    shown: list[str] = []
    model, blocks, states = recording(tmp_path, notify=shown.append)
    assert len(states) == len(blocks) == 9 and len(list((tmp_path / "states").glob("*.safetensors"))) == 3
    size = sum(path.stat().st_size for path in (tmp_path / "states").glob("*.safetensors"))
    announced = float(re.search(r": (\d+\.\d) MiB", shown[0])[1])
    assert abs(announced - size / 2**20) < 0.06
    index = torch.tensor([8, 0, 4])
    got, of = states.batch(index)
    want = blocks.select(index)
    torch.testing.assert_close(got, model.model(**want.model_inputs()).last_hidden_state)
    assert all(torch.equal(tensor, want.tensors()[name]) for name, tensor in of.tensors().items())


@torch.no_grad()
def test_states_of_mixed_precision_take_half_of_the_bytes(tmp_path: Path) -> None:
    model, blocks, whole = recording(tmp_path / "whole")
    half = recording(tmp_path / "half", dtype=torch.bfloat16)[2]
    index = torch.arange(len(blocks))
    with torch.autocast("cpu", torch.bfloat16):
        want = model.model(**blocks.select(index).model_inputs()).last_hidden_state.bfloat16()
    got, exact = half.batch(index)[0], whole.batch(index)[0]
    assert got.dtype == torch.bfloat16 and not torch.equal(got.float(), exact)
    torch.testing.assert_close(got, want, atol=0.05, rtol=0.05)  # batches of other sizes round otherwise
    sizes = [sum(p.stat().st_size for p in (tmp_path / n / "states").glob("*.safetensors")) for n in ("half", "whole")]
    assert sizes[0] - sizes[1] == pytest.approx(-blocks.input_ids.numel() * 32 * 2, rel=0.02)


@torch.no_grad()
def test_only_the_states_that_are_needed_are_kept(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("data.recorded._FILE_BYTES", 2500)
    needed = torch.rand(9, 16, generator=torch.Generator().manual_seed(0)) < 0.3
    needed[4] = False
    shown: list[str] = []
    model, blocks, whole = recording(tmp_path / "whole", layers=(1, 2))
    part = recording(tmp_path / "part", layers=(1, 2), needed=needed, notify=shown.append)[2]
    index, all_states = torch.tensor([8, 4, 0, 3]), whole.batch(torch.arange(9))[0]
    assert all_states.shape[-1] == 3 * 32 and part.layers == (1, 2)
    torch.testing.assert_close(all_states, features(model, (1, 2), **blocks.model_inputs()), atol=1e-5, rtol=1e-5)
    got, of = part.batch(index)
    want = torch.where(needed[index][..., None], all_states[index], 0.0)
    torch.testing.assert_close(got, want)
    assert torch.equal(of.labels, blocks.labels[index])
    files = list((tmp_path / "part" / "states").glob("*.safetensors"))
    announced = float(re.search(r": (\d+\.\d) MiB", shown[0])[1])
    assert len(files) > 3 and abs(announced - sum(path.stat().st_size for path in files) / 2**20) < 0.06
    assert part.covers(needed) and not part.covers(~needed) and whole.covers(~needed)


def test_a_killed_recording_goes_on_and_others_are_refused(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("data.recorded._FILE_BYTES", 3 * 16 * (32 * 4 + 24))
    from data import recorded

    save, saved = recorded._save, []

    def killed(path: Path, tensors: Any) -> None:
        if len(saved) == 2:
            raise KeyboardInterrupt
        saved.append(path.name)
        save(path, tensors)

    monkeypatch.setattr(recorded, "_save", killed)
    with pytest.raises(KeyboardInterrupt):
        recording(tmp_path)
    with pytest.raises(ValueError, match="holds an unfinished recording"):
        RecordedStates(tmp_path / "states", "sha256:0")
    saved.clear()
    model, blocks, states = recording(tmp_path)
    assert saved == ["states_00002.safetensors"] and len(states) == 9
    with pytest.raises(ValueError, match=r"are of a model with fingerprint sha256:.*: record them again"):
        RecordedStates(tmp_path / "states", fingerprint(tiny_llama(seed=1)))
    with pytest.raises(ValueError, match="holds another recording or other files"):
        recording(tmp_path)
