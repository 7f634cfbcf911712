"""What Medusa's training learns, moves and leaves alone; Medusa-2's LoRA; calibration and the best tree."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from checkpoints.load import load_adapter
from data.text import IGNORED, Blocks, TokenDocument, pack
from modules.lora import lora_off
from modules.medusa import StackedHeads, heads_of
from modules.medusa.config import READS
from modules.medusa.output_layer import last_hidden_state
from tests.tiny_language import tiny_llama
from tests.tiny_medusa import PAD, periodic, tiny_task
from trainers.base import state_hash
from trainers.medusa.calibration import Text, best_tree, count_hits, greedy_texts
from trainers.run_folder import RunFolder
from trainers.training import restore, train

LORA = {
    "lora.rank": "2",
    "lora.targets": "[q_proj, v_proj, down_proj]",
    "lora.dropout": "0",
    "optimizer.lr": "0.02",
}


def blocks_of(task: Any) -> Any:
    return task._text()


def run(task: Any, folder: Path) -> Any:
    train(task, RunFolder(folder), Console(file=io.StringIO()))
    return task


def test_heads_learn_how_far_they_look(tmp_path: Path) -> None:
    """On x_t = t mod P head k must say x + k + 2: one place off would be seen."""
    period = 13
    task = tiny_task(
        periodic(period, 24, period), trainer__max_steps="80", module__num_heads="3", data__batch_size="13"
    )
    frozen = state_hash(task.model)
    run(task, tmp_path)
    blocks = blocks_of(task)
    hidden = last_hidden_state(task.model, input_ids=blocks.input_ids, position_ids=blocks.position_ids)
    for head in range(3):
        guesses = task.learned.heads(hidden, task.layer, head).argmax(-1)
        want = 2 + (blocks.input_ids - 2 + head + 2) % period
        assert (guesses == want)[:, 2:].float().mean() > 0.95, head
    assert state_hash(task.model) == frozen
    assert all(parameter.grad is None for parameter in task.model.parameters())


def test_only_heads_that_read_a_token_know_what_follows_it(tmp_path: Path) -> None:
    """Of (a, a + 20, a + 40, b, ..) with random a, b, .. what follows is known only to who has seen the first."""

    def texts(seed: int) -> Blocks:
        first = torch.randint(2, 12, (32, 8), generator=torch.Generator().manual_seed(seed))
        rows = torch.stack([first, first + 20, first + 40], dim=2).flatten(1).tolist()
        return pack([TokenDocument(ids, [True] * len(ids)) for ids in rows], 24, PAD, whole=True)

    unseen, right = texts(1), {}
    ids = unseen.input_ids
    for reads in READS:
        task = tiny_task(texts(0), trainer__max_steps="100", module__num_heads="2", module__reads=reads)
        run(task, tmp_path / reads)
        hidden = last_hidden_state(task.model, input_ids=ids, position_ids=unseen.position_ids)
        for head, before in ((0, 2), (1, 1)):  # the first head before a, the second two places before a
            places = torch.arange(before, 18, 3)
            path = torch.stack([ids[:, places + 1], ids[:, places + 2]], dim=-1)
            guesses = task.learned.heads(hidden[:, places], task.layer, head, path=path).argmax(-1)
            right[reads, head] = float((guesses == ids[:, places + 2 + head]).float().mean())
    assert max(right["state", 0], right["state", 1], right["root", 1]) < 0.3, right
    assert min(right["root", 0], right["path", 0], right["path", 1]) > 0.95, right


def test_documents_that_share_a_block_do_not_see_each_other() -> None:
    texts = [[5, 9, 30, 7, 11, 200], [44, 3, 2, 90, 8]]
    task = tiny_task(pack([TokenDocument(ids, [True] * len(ids)) for ids in texts], 12, PAD, whole=True))
    together = task._hidden(blocks_of(task))[0]
    alone = [last_hidden_state(task.model, input_ids=torch.tensor([ids]))[0] for ids in texts]
    torch.testing.assert_close(together[: len(texts[0])], alone[0])
    torch.testing.assert_close(together[len(texts[0]) : sum(map(len, texts))], alone[1])


@pytest.mark.parametrize("vocabulary", ["tied", "own"])
def test_medusa_2_trains_lora_beside_the_heads_and_leaves_the_backbone(tmp_path: Path, vocabulary: str) -> None:
    blocks, model = periodic(13, 24, 13), tiny_llama()
    original = {name: value.clone() for name, value in model.state_dict().items()}
    ids = torch.tensor([[5, 9, 30, 7, 11, 200]])
    want = model(input_ids=ids).logits
    targets = "[q_proj, down_proj, lm_head]"
    changes = {**LORA, "lora.targets": targets, "lora.loss": "ce", "module.vocabulary": vocabulary}
    task = tiny_task(blocks, model, **changes, trainer__max_steps="6", trainer__save_every="3")
    assert torch.equal(model(input_ids=ids).logits, want)
    before = {name: value.clone() for name, value in task.learned.state_dict().items()}
    run(task, tmp_path)
    moved = {name for name, value in task.learned.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == before.keys()
    assert not torch.equal(model(input_ids=ids).logits, want)
    with lora_off(model):
        assert torch.equal(model(input_ids=ids).logits, want)
    kept = {name.replace(".base_layer", ""): value for name, value in model.state_dict().items()}
    assert all(torch.equal(kept[name], value) for name, value in original.items())
    table = {row["part"]: row for row in task.parameter_table()}
    frozen = next(row for name, row in table.items() if name.startswith("backbone"))
    assert frozen["parameters"] == sum(p.numel() for p in tiny_llama().parameters())
    assert "learned.lora" in table


@pytest.mark.parametrize("loss", ["ce", "kl"])
@pytest.mark.parametrize("layers", ["[]", "[1,2]"])
def test_recorded_states_train_the_same_heads(tmp_path: Path, loss: str, layers: str) -> None:
    trained, blocks = [], periodic(13, 24, 13)
    blocks.labels[:, 7:12] = IGNORED  # states that nobody looks at are not kept
    settings = {"objective.loss": loss, "module.layers": layers, "module.reads": "path", "module.num_heads": "2"}
    for more in ({}, {"data.recorded": str(tmp_path / "states")}, {"data.recorded": str(tmp_path / "states")}):
        task = tiny_task(blocks, **settings, **more, trainer__max_steps="3", trainer__save_every="3")
        trained.append(run(task, tmp_path / str(len(trained))).learned.state_dict())
    assert (task.learned.heads.fuse is not None) == (layers != "[]")
    with pytest.raises(ValueError, match="whose states are of layers .* and for other heads"):
        run(tiny_task(blocks, **{**settings, **more, "module.num_heads": "3"}), tmp_path / "other")
    assert (tmp_path / "states" / "index.json").is_file()
    torch.testing.assert_close(trained[1], trained[0])
    assert all(torch.equal(value, trained[1][name]) for name, value in trained[2].items())


def test_drawn_positions_are_the_same_again_and_others_in_every_update(tmp_path: Path) -> None:
    task = tiny_task(periodic(13, 24, 13), objective__positions="20", trainer__max_steps="2")
    drawn: list[list[int]] = []
    draw = task._draw
    task._draw = lambda count: (drawn.append((chosen := draw(count)).tolist()), chosen)[1]
    run(task, tmp_path / "one")
    again = tiny_task(periodic(13, 24, 13), objective__positions="20", trainer__max_steps="2")
    assert len(drawn) == 2 and all(len(set(each)) == 20 for each in drawn) and drawn[0] != drawn[1]
    want, got = task.learned.state_dict(), run(again, tmp_path / "two").learned.state_dict()
    assert all(torch.equal(want[name], got[name]) for name in want)


def test_states_find_a_folder_of_their_own_for_every_text(tmp_path: Path) -> None:
    settings = {"data.recorded": "auto", "output_dir": str(tmp_path), "trainer__max_steps": "1"}
    for number, period in enumerate((13, 13, 11)):
        run(tiny_task(periodic(period, 24, period), **settings), tmp_path / f"run{number}")
    lora = {**settings, "lora.rank": "2", "lora.targets": "[q_proj]", "lora.dropout": "0"}
    run(tiny_task(periodic(7, 24, 7), **lora), tmp_path / "lora")  # states that change are computed every time
    folders = list((tmp_path / "recorded").iterdir())
    assert len(folders) == 2 and all((folder / "index.json").is_file() for folder in folders)


def gradients(task: Any, loss: Tensor) -> list[Tensor]:
    parameters = [p for part in task.lora_parts().values() for p in part.parameters()]
    return list(torch.autograd.grad(loss, parameters, allow_unused=False))


def test_medusa_2s_own_loss_is_the_divergence_from_the_backbone_without_lora() -> None:
    task = tiny_task(periodic(13, 24, 4), **{**LORA, "lora.targets": "[q_proj, lm_head]"})
    blocks = blocks_of(task)
    assert task._backbone_loss(task._hidden(blocks), blocks).abs() < 1e-6
    with torch.no_grad():
        for part in task.lora_parts().values():
            for parameter in part.parameters():
                parameter.normal_(std=0.2)
    with torch.no_grad(), lora_off(task.model):
        theirs = task.model(input_ids=blocks.input_ids, position_ids=blocks.position_ids).logits[:, :-1].log_softmax(-1)
    ours = task.model(input_ids=blocks.input_ids, position_ids=blocks.position_ids).logits[:, :-1].log_softmax(-1)
    want = (theirs.exp() * (theirs - ours)).sum(-1)[blocks.labels[:, 1:] != -100].mean()
    task.settings.objective.logits_mib = 1
    got = task._backbone_loss(task._hidden(blocks), blocks)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(gradients(task, got), gradients(task, want))


def test_medusa_2_begins_with_the_heads_alone(tmp_path: Path) -> None:
    task = tiny_task(periodic(13, 24, 13), **LORA, lora__heads_first="4", trainer__max_steps="5")
    seen = []
    step = task.training_step

    def watched(batch: Any, batch_idx: int) -> Tensor:
        seen.append((task.global_step, task._backbone_learns()))
        return step(batch, batch_idx)

    task.training_step = watched
    run(task, tmp_path)
    assert seen == [(0, False), (1, False), (2, False), (3, False), (4, True)]


def test_a_medusa_2_adapter_brings_its_lora_and_takes_it_away(tmp_path: Path) -> None:
    changes = {**LORA, "lora.loss": "ce", "trainer.max_steps": "6", "trainer.save_every": "6"}
    task = run(tiny_task(periodic(13, 24, 13), **changes), tmp_path)
    task.export_adapter(tmp_path / "adapter")
    checkpoint = RunFolder(tmp_path).latest_checkpoint()
    assert checkpoint is not None
    restored = tiny_task(periodic(13, 24, 13), **changes)
    restore(restored, checkpoint)
    assert all(torch.equal(value, task.lora_tensors()[name]) for name, value in restored.lora_tensors().items())
    model, ids = tiny_llama(), torch.tensor([[5, 9, 30, 7, 11, 200]])
    want, parts = model(input_ids=ids).logits, {name: type(part) for name, part in model.named_modules()}
    call = {"input_ids": ids, "max_new_tokens": 12, "do_sample": False}
    with load_adapter(model, tmp_path / "adapter"):
        task.learned.eval()
        torch.testing.assert_close(model(input_ids=ids).logits, task.model(input_ids=ids).logits)
        assert not torch.equal(model(input_ids=ids).logits, want)
        assert torch.equal(model.generate(**call), task.model.generate(**call))
        assert not any(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(model(input_ids=ids).logits, want)
    assert {name: type(part) for name, part in model.named_modules()} == parts and not hasattr(model, "peft_config")
    with pytest.raises(ValueError, match="no place for the LoRA"):
        task.export_formats["tgi"](tmp_path / "tgi")


def test_an_adapter_may_store_half_of_the_bytes_and_runs_in_the_backbones_dtype(tmp_path: Path) -> None:
    blocks = periodic(13, 24, 13)
    whole, half = (tiny_task(blocks, module__stored=kind) for kind in ("backbone", "bfloat16"))
    for task, name in ((whole, "whole"), (half, "half")):
        task.export_adapter(tmp_path / name)
    sizes = [(tmp_path / name / "adapter_model.safetensors").stat().st_size for name in ("whole", "half")]
    assert 1.8 < sizes[0] / sizes[1] < 2.0
    model = tiny_llama()
    with load_adapter(model, tmp_path / "half") as handle:
        assert handle.medusa.heads.logits(torch.randn(1, 32)).dtype == torch.float32


def test_the_sine_ramp_ends_at_the_full_weight() -> None:
    task = tiny_task(periodic(13, 24, 4), **LORA, lora__ramp="sine", lora__heads_weight="0.5", trainer__max_steps="1")
    assert task._heads_weight() == pytest.approx(0.5)


@pytest.mark.parametrize("reads", READS)
def test_hits_are_counted_where_decoding_would_have_guessed(reads: str) -> None:
    task = tiny_task(periodic(13, 24, 4), module__reads=reads)
    texts = greedy_texts(task.model, [[5, 6, 7], [9]], new_tokens=6, batch_size=2, pad=PAD)
    for text, prompt in zip(texts, ([5, 6, 7], [9]), strict=True):
        alone = task.model.generate(input_ids=torch.tensor([prompt]), max_new_tokens=6, do_sample=False)
        assert list(text.ids) == alone[0].tolist() and text.prompt == len(prompt)
    heads = heads_of(task.learned.heads.config, task._head_tensors(), task.model)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    stacked = StackedHeads(heads, task.layer)
    hits, counts = count_hits(task.model, stacked, texts, 3)
    want = [[0] * 3 for _ in range(2)]
    compared = [0, 0]
    for text in texts:
        for place in range(text.prompt - 1, len(text.ids)):
            if place + 1 == len(text.ids):
                continue  # the last state has no root yet
            hidden = last_hidden_state(task.model, input_ids=torch.tensor([text.ids[: place + 1]]))[:, -1]
            path = torch.tensor([[*text.ids[place + 1 : place + 3], 0][:2]])
            guesses = stacked.tokens(hidden, 3, path_BR=path)[:, 0].tolist()
            for head in range(2):
                if place + 2 + head < len(text.ids):
                    compared[head] += 1
                    for rank in range(3):
                        want[head][rank] += guesses[head][rank] == text.ids[place + 2 + head]
    assert counts == compared and hits == want and sum(map(sum, hits)) > 0


def test_counting_is_the_same_however_long_the_text() -> None:
    task = tiny_task(periodic(13, 24, 4))
    heads = StackedHeads(heads_of(task.learned.heads.config, task._head_tensors(), task.model), task.layer)
    ids = tuple(torch.randint(2, 250, (90,), generator=torch.Generator().manual_seed(1)).tolist())
    hits, counts = count_hits(task.model, heads, [Text(ids, 3)], 4)
    assert counts == [90 - 4, 90 - 5] and all(len(row) == 4 for row in hits)


def test_guesses_that_never_hit_are_left_out() -> None:
    assert best_tree([[0.0, 0.5], [0.0, 0.0]], 9) == [[1]]
    assert best_tree([[0.0], [0.5]], 9) == []
    assert best_tree([[0.2, 0.6], [0.5]], 3) == [[1], [1, 0], [0]]


def test_what_is_watched_is_what_the_export_does(tmp_path: Path) -> None:
    period = 13
    blocks = periodic(period, 24, period)
    prompts = [blocks.input_ids[row, :8].tolist() for row in range(3)]
    task = tiny_task(blocks, None, prompts, trainer__max_steps="40", trainer__sample_every="40", data__new_tokens="16")
    noted: dict[str, Tensor] = {}
    keep = task.note
    task.note = lambda **values: (noted.update(values), keep(**values))[0]
    run(task, tmp_path)
    with task.drafting(task.counted(16)) as handle:
        greedy_texts(task.model, task.prompts, new_tokens=16, batch_size=1, pad=PAD)
        assert noted["tokens_per_step"] == pytest.approx(handle.counts.tokens_per_step)
    assert "generate" not in vars(task.model)
