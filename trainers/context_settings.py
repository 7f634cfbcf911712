"""What the recipes of learned KV caches have in common: contexts that are compressed, and what follows them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from trainers.config import RecipeBase, Section, Text

NEEDLE = "needle"


class ContextData(Section):
    """What is learned from."""

    kind: Literal["needle", "text", "pairs"] = Field(
        default="text",
        description="needle draws rows of noise with needles and questions, text cuts windows out of path, pairs takes "
        "prompts with their answers from it, one a batch",
    )
    path: Text = Field(
        default="stdlib",
        description="of text and pairs: a file or a folder of text or .jsonl, a folder that datasets saved, a Hub id, "
        "or stdlib: the sources of Python's standard library",
    )
    length: PositiveInt = Field(default=256, description="tokens of the context; longer prompts lose their beginning")
    shortest: PositiveInt | None = Field(
        default=None,
        description="of needle: every batch draws the length of its contexts from here to length; null takes length. "
        "What is learned at one length alone may hold at that length alone",
    )
    following: PositiveInt = Field(default=64, description="tokens behind the context, of text")
    batch_size: PositiveInt = Field(default=8, description="rows per update and device")
    needles: PositiveInt = Field(default=8, description="needles in a row")
    questions: PositiveInt = Field(default=8, description="questions behind it")
    decoys: int = Field(
        default=0,
        ge=0,
        description="of needle: needles that nobody asks for; every batch draws from none to so many. In rows that "
        "have some, only half of the keys are ever asked for",
    )
    known: bool = Field(
        default=False,
        description="of needle: contexts end with the questions, 2 tokens each, for what reads them first "
        "(module.query_aware)",
    )

    @model_validator(mode="after")
    def _pairs_come_alone(self) -> ContextData:
        if self.kind == "pairs" and self.batch_size != 1:
            raise ValueError("kind pairs has prompts of different lengths: set batch_size to 1")
        if self.shortest is not None and (self.kind != "needle" or self.shortest > self.length):
            raise ValueError("shortest is for kind needle, and at most length: leave it out, or lower it")
        if self.kind != NEEDLE and (self.decoys or self.known):
            raise ValueError("decoys and known are for kind needle: leave them out")
        if self.questions > self.needles:
            raise ValueError(f"{self.questions} questions ask for different ones of {self.needles} needles: ask fewer")
        return self


class ContextRecipe(RecipeBase):
    """A recipe whose adapter is measured on contexts of the kind that it is trained on."""

    data: ContextData = Field(default_factory=ContextData, description="what it learns from")

    @model_validator(mode="after")
    def _evaluation_is_of_the_same_kind(self) -> ContextRecipe:
        if self.evaluation.prompts is None:
            self.evaluation.prompts = NEEDLE if self.data.kind == "needle" else self.data.path
        return self
