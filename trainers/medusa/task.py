"""The task that trains Medusa: what one update does, what is watched, what is exported."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

from data.recorded import INDEX_FILE, RecordedStates, record_states
from data.text import IGNORED, Blocks
from modules.lora import lora_off
from modules.medusa import (
    MedusaConfig,
    MedusaHandle,
    MedusaHeads,
    OutputLayer,
    StackedHeads,
    attach_heads,
    heads_of,
    module_entry,
)
from modules.medusa.chunked import chunked_sum
from modules.medusa.output_layer import features
from trainers.adapters import write_task_adapter
from trainers.lora_task import LoraTask
from trainers.medusa.calibration import Text, calibrated, greedy_texts
from trainers.medusa.layouts import ENGINES, write_layout
from trainers.medusa.objective import head_losses, head_weights, needed_states
from trainers.schemas.medusa import Recipe

WATCHED_NODES, WATCHED_PROMPTS = 16, 8

Batch = tuple[Tensor, Tensor, Tensor, Tensor | None]
"""Ids, positions, labels, and the last hidden states where they were recorded."""


class Learned(nn.Module):
    """All that is trained: the heads, and for Medusa-2 the LoRA parts of the backbone's layers, shared with it."""

    def __init__(self, heads: MedusaHeads) -> None:
        super().__init__()
        self.heads = heads


class MedusaTask(LoraTask):
    """Frozen language model, learned heads.

    Attributes:
        layer: the backbone's output layer.
        prompts: held-out prompts, token ids, that calibration and the accepted length are measured on.
        pad: the token that shorter prompts of a batch are filled up with.
    """

    learned: Learned
    unit = "tokens"
    runs_whole_backbone = False  # its layers give the hidden states, its output matrix is used by itself

    def __init__(
        self,
        recipe: Recipe,
        model: Any,
        heads: MedusaHeads,
        text: Callable[[], Blocks],
        prompts: Sequence[Sequence[int]],
        pad: int,
    ) -> None:
        copied = {"heads": "the output matrix"} if recipe.module.vocabulary in ("own", "pruned") else {}
        super().__init__(model, Learned(heads), recipe, recipe.lora, copied)
        self.settings, self.prompts, self.pad, self._text = recipe, list(prompts), pad, text
        self.units_per_sample = recipe.data.length
        self.may_leave_unused = bool(recipe.lora.heads_first)
        self.layer = OutputLayer.of(model)
        self._greedy: list[Text] | None = None
        self._calibrated: tuple[int, MedusaConfig] | None = None

    @property
    def model(self) -> Any:
        """The backbone, with its output matrix."""
        return self.backbone

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The heads, and LoRA with a learning rate of its own."""
        return [{"params": list(self.learned.heads.parameters())}, *self.lora_group()]

    def train_dataloader(self) -> DataLoader[Any]:
        """Packed blocks, made when training begins: an export has no need of them."""
        blocks = self._text()
        folder = self._recording(blocks)
        states = None if folder is None else self._recorded(blocks, folder)

        def fetch(index: Tensor) -> Batch:
            hidden, chosen = (None, blocks.select(index)) if states is None else states.batch(index)
            return chosen.input_ids, chosen.position_ids, chosen.labels, hidden

        return self.stepped_loader(fetch, len(blocks), self.settings.data.batch_size)

    def _recording(self, blocks: Blocks) -> Path | None:
        """The folder of the recorded states, if the recipe wants them; "auto" names it by backbone and text."""
        named, trainer = self.settings.data.recorded, self.settings.trainer
        if named != "auto":
            return None if named is None else Path(named)
        if self.settings.lora.rank or trainer.devices != 1 or trainer.num_nodes != 1:
            return None
        config = self.learned.heads.config
        told = hashlib.sha256(f"{self.identity[0]} {self._mixed()} {config.layers}".encode())
        for tensor in (*blocks.tensors().values(), needed_states(blocks, config.num_heads)):
            told.update(tensor.numpy().tobytes())
        return Path(self.settings.output_dir) / "recorded" / told.hexdigest()[:16]

    def _recorded(self, blocks: Blocks, folder: Path) -> RecordedStates:
        """The states of these blocks, read back or computed first."""
        config = self.learned.heads.config
        needed = needed_states(blocks, config.num_heads)
        if not (folder / INDEX_FILE).is_file():
            return record_states(
                self.model,
                blocks,
                folder,
                fingerprint=self.identity[0],
                batch_size=self.settings.data.batch_size,
                dtype=self._mixed(),
                layers=config.layers,
                needed=needed,
            )
        states = RecordedStates(folder, self.identity[0])
        last = torch.tensor([len(states) - 1])
        if len(states) != len(blocks) or not torch.equal(states.batch(last)[1].labels, blocks.select(last).labels):
            raise ValueError(f"data.recorded is '{folder}', which holds states of another text: name a new folder")
        if states.layers != tuple(config.layers) or not states.covers(needed):
            raise ValueError(
                f"data.recorded is '{folder}', whose states are of layers {list(states.layers)} and for other heads: "
                "name a new folder"
            )
        return states

    def _mixed(self) -> torch.dtype | None:
        """What mixed precision computes in, None without it."""
        names = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
        return names.get(self.settings.trainer.precision)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One update's loss: the heads', and for Medusa-2 the backbone's own beside it."""
        blocks, recorded = Blocks(*batch[:3]), batch[3]
        if recorded is not None:
            return self._heads_loss(recorded, blocks)
        if not self._backbone_learns():
            with torch.no_grad(), self.without_lora():
                hidden = self._hidden(blocks)
            return self._heads_loss(hidden, blocks)
        hidden = self._hidden(blocks)
        own = self._backbone_loss(hidden, blocks)
        loss = own + self._heads_weight() * self._heads_loss(hidden, blocks)
        self.note(backbone_loss=own)
        return loss

    def _hidden(self, blocks: Blocks) -> Tensor:
        # Positions that begin anew are how transformers keeps the documents of a row apart.
        return features(self.model, self.learned.heads.config.layers, **blocks.model_inputs())

    def _heads_loss(self, hidden: Tensor, blocks: Blocks) -> Tensor:
        objective, heads, rows = self.settings.objective, self.learned.heads, self._rows()
        draw = None if objective.positions is None else self._draw
        found = head_losses(
            heads, hidden, blocks, self.layer, kind=objective.loss, eta=objective.eta, rows=rows, draw=draw
        )
        for number, one in enumerate(found, start=1):
            self.note(**{f"accuracy_{number}": one.accuracy, f"loss_{number}": one.loss})
        weights = head_weights(len(found), objective.decay)
        loss = torch.stack([weight * one.loss for weight, one in zip(weights, found, strict=True)]).sum()
        self.note(loss=loss)
        return loss

    def _draw(self, count: int) -> Tensor:
        """Some of so many positions, without repeats; the base seeds each rank's random numbers for every batch."""
        return torch.randperm(count)[: self.settings.objective.positions]

    def _rows(self) -> int:
        """Positions whose logits exist at a time."""
        return max(1, (self.settings.objective.logits_mib << 20) // (4 * self.learned.heads.config.vocab_size))

    # Medusa-2.

    def _backbone_learns(self) -> bool:
        return bool(self.settings.lora.rank) and self.global_step >= self.settings.lora.heads_first

    def _heads_weight(self) -> float:
        settings, last = self.settings.lora, self.settings.trainer.max_steps
        if settings.ramp == "constant":
            return settings.heads_weight
        return settings.heads_weight * math.sin(math.pi / 2 * (self.global_step + 1) / last)

    def _backbone_loss(self, hidden: Tensor, blocks: Blocks) -> Tensor:
        """KL to the same weights with LoRA off, or cross entropy with the text, over the tokens to be learned."""
        n, t = (blocks.labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
        targets, teacher, width = blocks.labels[n, t + 1], None, self.learned.heads.config.hidden_size
        if self.settings.lora.loss == "kl":
            with torch.no_grad(), lora_off(self.model):
                teacher = self._hidden(blocks)[n, t, :width]

        def reduce(logits: Tensor, part: slice) -> tuple[Tensor, Tensor]:
            logits, hits = logits.float(), (logits.detach().argmax(-1) == targets[part]).sum()
            if teacher is None:
                return functional.cross_entropy(logits, targets[part], reduction="sum"), hits
            with torch.no_grad(), lora_off(self.layer.matrix):
                theirs = functional.log_softmax(self.layer.logits(teacher[part]).float(), -1)
            ours = functional.log_softmax(logits, -1)
            return functional.kl_div(ours, theirs, reduction="sum", log_target=True), hits

        total, _ = chunked_sum(self.layer.logits, reduce, hidden[n, t, :width], self.layer.learned(), self._rows())
        return total / max(1, len(n))

    # Watching, calibration and export.

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Every `sample_every` updates: tokens per step of what would be exported, on the held-out prompts."""
        every = self.settings.trainer.sample_every
        if every and self.steps_done % every == 0 and self.prompts:
            with self.consolidated(), self.drafting(self.counted(WATCHED_NODES)) as handle:
                greedy_texts(self.model, self.prompts[:WATCHED_PROMPTS], **self._decoding(batch_size=1))
                self.note(tokens_per_step=torch.tensor(handle.counts.tokens_per_step))

    def on_train_end(self) -> None:
        """Where only all ranks can run the backbone, they calibrate while they are all there."""
        super().on_train_end()
        if not self.backbone_is_whole:
            self.calibrated()

    @contextmanager
    def drafting(self, config: MedusaConfig) -> Iterator[MedusaHandle]:
        """The model as a user of the exported adapter has it, with the tree of a config."""
        heads = heads_of(replace(config, lora=None), self._head_tensors(), self.model)
        with self.evaluating(), attach_heads(self.model, heads, self.layer) as handle:
            yield handle

    def calibrated(self) -> MedusaConfig:
        """The config with hits and counts along the backbone's own decode, and with the tree that pays best here."""
        if self._calibrated is None or self._calibrated[0] != self.steps_done:
            self._calibrated = self.steps_done, self.counted(self.settings.module.nodes)
        return self._calibrated[1]

    def counted(self, nodes: int | str) -> MedusaConfig:
        """The config with hits and counts of the present weights, and a tree of so many nodes."""
        config = self.learned.heads.config
        with self.evaluating():
            heads = StackedHeads(heads_of(config, self._head_tensors(), self.model), self.layer)
            return calibrated(self.model, heads, config, self._texts(), self.settings.module.ranks, nodes)

    def _texts(self) -> list[Text]:
        """The backbone's own greedy texts; they change only where the backbone learns along."""
        if self._greedy is None or self.settings.lora.rank:
            self._greedy = greedy_texts(self.model, self.prompts, **self._decoding())
        return self._greedy

    def _decoding(self, **changes: int) -> dict[str, Any]:
        data = self.settings.data
        return {"new_tokens": data.new_tokens, "batch_size": data.batch_size, "pad": self.pad, **changes}

    def _head_tensors(self) -> dict[str, Tensor]:
        """The exported heads' tensors as the adapter stores them, on the CPU."""
        heads = cast(Learned, self.exported).heads
        return {name: self._stored(value) for name, value in heads.state_dict().items()}

    def _stored(self, value: Tensor) -> Tensor:
        dtype = torch.bfloat16 if self.settings.module.stored == "bfloat16" else self.model.dtype
        return value.detach().to("cpu", dtype if value.is_floating_point() else value.dtype, copy=True).contiguous()

    def export_adapter(self, folder: Path) -> None:
        """Heads, tree, hits and counts, and the LoRA of Medusa-2."""
        lora = {name: self._stored(value) for name, value in self.lora_tensors().items()}
        write_task_adapter(self, folder, module_entry(self.calibrated()), self._head_tensors() | lora)

    @property
    def export_formats(self) -> dict[str, Callable[[Path], None]]:
        """What else than an adapter can be written, for serving engines."""
        return {name: partial(self._export_layout, name) for name in ENGINES}

    def _export_layout(self, name: str, folder: Path) -> None:
        config, base = self.learned.heads.config, self.settings.backbone.name
        write_layout(name, folder, config, self._head_tensors(), self.layer, base)
