"""What a Medusa recipe may say (docs/methods/medusa.md)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from trainers.config import RecipeBase, Section, Text
from trainers.lora_settings import LoraSettings


class Module(Section):
    """The heads, and the tree that they draft."""

    num_heads: PositiveInt = Field(default=4, description="heads; head k guesses the token k + 1 places after the next")
    num_blocks: PositiveInt = Field(default=1, description="residual blocks of each head")
    vocabulary: Literal["own", "tied", "pruned", "low_rank"] = Field(
        default="own",
        description="a head's output matrix: its own, the backbone's, its own over the most frequent tokens, or the "
        "backbone's plus a product of low rank",
    )
    draft_vocab_size: PositiveInt | None = Field(
        default=None, description="tokens that pruned heads tell apart: the most frequent ones of the training text"
    )
    rank: PositiveInt | None = Field(default=None, description="rank of the low-rank correction, 64 to 256")
    reads: Literal["state", "root", "path"] = Field(
        default="state",
        description="what a head guesses from beside the hidden state: nothing (Medusa), the token that the backbone "
        "chose from it, or that one and the guesses before its own (Hydra); serving engines load the first kind only",
    )
    layers: list[PositiveInt] = Field(
        default_factory=list,
        description="decoder layers, from 1, whose outputs the heads read beside the last hidden state (EAGLE-3); "
        "serving engines load heads without",
    )
    stored: Literal["backbone", "bfloat16"] = Field(
        default="backbone",
        description="dtype of the adapter's numbers; they run in the backbone's, and only guess, so half of float32's "
        "bytes cost next to nothing",
    )
    nodes: PositiveInt | Literal["measured"] = Field(
        default="measured",
        description="drafted tokens per step, or as many as pay by the step time measured on this device",
    )
    ranks: PositiveInt = Field(default=10, description="guesses of each head that calibration counts and the tree uses")

    @model_validator(mode="after")
    def _sizes_go_with_the_vocabulary(self) -> Module:
        if (self.draft_vocab_size is None) == (self.vocabulary == "pruned"):
            raise ValueError(
                "vocabulary pruned needs draft_vocab_size" if self.vocabulary == "pruned" else
                f"draft_vocab_size is for vocabulary pruned, not for {self.vocabulary}"
            )  # fmt: skip
        if (self.rank is None) == (self.vocabulary == "low_rank"):
            raise ValueError(
                "vocabulary low_rank needs rank" if self.vocabulary == "low_rank" else
                f"rank is for vocabulary low_rank, not for {self.vocabulary}"
            )  # fmt: skip
        if sorted(set(self.layers)) != self.layers:
            raise ValueError(f"layers is {self.layers}: name each layer once, in their order")
        return self


class Data(Section):
    """What the heads learn from, best what the backbone itself would say."""

    path: Text = Field(
        default="stdlib",
        description="a text file, a .jsonl file with text, prompt and response, or messages, a folder of these, a "
        "folder that datasets saved, a Hub id, or stdlib: the sources of Python's standard library",
    )
    answers: int = Field(
        default=0,
        ge=0,
        description="prompts of stdlib that the backbone answers first, to be learned from instead; 0 takes path as it "
        "is, which may hold such answers already (python -m trainers.distill)",
    )
    answer_tokens: PositiveInt = Field(default=128, description="most tokens of such an answer")
    temperature: float = Field(default=0.3, ge=0, description="that the answers are drawn with")
    length: PositiveInt = Field(default=512, description="tokens of a training block; documents are packed into them")
    whole: bool = Field(default=False, description="every document stays in one block, cut at length (conversations)")
    batch_size: PositiveInt = Field(default=8, description="blocks per update and device, prompts decoded at a time")
    recorded: Text | None = Field(
        default=None,
        description="folder for the backbone's last hidden states of all blocks, computed once and streamed back, or "
        "auto for one under output_dir where one process trains and no LoRA does; null runs the backbone in every "
        "update",
    )
    prompts: Text | None = Field(
        default=None, description="where held-out prompts for calibration come from, as path; null takes path"
    )
    holdout: PositiveInt = Field(default=64, description="held-out prompts for calibration and the watched acceptance")
    prompt_length: PositiveInt = Field(default=256, description="most tokens of such a prompt")
    new_tokens: PositiveInt = Field(default=96, description="tokens decoded for each of them")


class Objective(Section):
    """What the heads are asked to reproduce."""

    loss: Literal["ce", "kl", "lk"] = Field(
        default="ce",
        description="cross entropy with the text, KL to the backbone's own later logits, or LK, which goes from KL to "
        "the accepted share as that rises",
    )
    decay: float = Field(default=0.8, gt=0, le=1, description="weight of head k is decay^k")
    eta: float = Field(default=3.0, ge=0, description="how soon LK turns from KL to the accepted share")
    positions: PositiveInt | None = Field(
        default=None,
        description="positions of a batch that an update looks at, drawn anew each time; null for all.  Neighbours say "
        "nearly the same, so with recorded states few of each of many blocks teach more than all of a few",
    )
    logits_mib: PositiveInt = Field(
        default=256, description="MiB of logits that exist at a time, whatever vocabulary, heads and batch are"
    )


class Lora(LoraSettings):
    """Medusa-2: the backbone is trained along, through LoRA."""

    loss: Literal["kl", "ce"] = Field(
        default="kl",
        description="the backbone's own loss: KL to itself with LoRA off (for text that it wrote), or the text's",
    )
    heads_weight: float = Field(default=0.2, gt=0, description="weight of the heads' loss beside the backbone's own")
    ramp: Literal["constant", "sine"] = Field(
        default="constant", description="course of that weight: constant, or from zero by a quarter sine"
    )
    heads_first: int = Field(default=0, ge=0, description="first updates that train the heads alone, LoRA being off")


class Recipe(RecipeBase):
    """Medusa (arXiv:2401.10774)."""

    method: Literal["medusa"] = Field(default="medusa", description="Medusa")
    module: Module = Field(default_factory=Module, description="heads and tree")
    data: Data = Field(default_factory=Data, description="what they learn from")
    objective: Objective = Field(default_factory=Objective, description="what the heads are asked to reproduce")
    lora: Lora = Field(default_factory=Lora, description="Medusa-2: training the backbone along")

    @model_validator(mode="after")
    def _parts_agree(self) -> Recipe:
        if self.data.answers and self.data.path != "stdlib":
            raise ValueError(
                "data.answers answers prompts of stdlib: of other sources run python -m trainers.distill, and set "
                "data.path to its output"
            )
        named = self.data.recorded not in (None, "auto")  # auto records where that is possible
        if self.lora.rank and named:
            raise ValueError("data.recorded holds states of the backbone as it is: leave it out where lora trains it")
        if named and self.trainer.devices != 1:
            raise ValueError("data.recorded is written and read by one process: set trainer.devices to 1")
        if self.evaluation.prompts is None:
            self.evaluation.prompts = self.data.prompts or self.data.path
        if self.lora.rank and self.trainer.ema:
            raise ValueError(
                "trainer.ema averages the heads alone: set it to 0 where lora.rank trains the backbone too"
            )
        if self.lora.heads_first >= self.trainer.max_steps and self.lora.rank:
            raise ValueError(
                f"lora.heads_first is {self.lora.heads_first}, so LoRA would not train in max_steps updates"
            )
        return self
