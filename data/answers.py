"""A language model's own answers to prompts, in batches whose result is a function of their prompts and seeds alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from data.records import Record
from data.stepped import derive_seed
from modules.decode_host.growing import give_room


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How answers are drawn; a temperature of 0 takes the likeliest token."""

    max_new_tokens: int
    temperature: float
    top_p: float = 1.0


class SeededChoice(LogitsProcessor):
    """Samples by inverting the distribution function, with a generator for every row.

    `generate` draws from one generator for the whole batch, where a row's answer depends on its neighbours.  One number
    a row is drawn, since noise for every token of the vocabulary takes longer than a small model's step.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [B, V] whose largest entry is a sample of their softmax: 0 there, and minus infinity elsewhere."""
        below = scores.float().softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
        drawn = [torch.rand(1, generator=each, dtype=torch.float64, device=scores.device) for each in self._generators]
        chosen = torch.searchsorted(below, torch.stack(drawn) * below[:, -1:], right=True)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)


@dataclass
class _Dialogue:
    """A prompt being answered: plain text, or messages up to a question, and the questions still to come."""

    text: str
    said: list[dict[str, str]]
    rest: list[dict[str, str]]
    response: str = ""
    finished: bool = True

    @classmethod
    def of(cls, prompt: Record) -> _Dialogue:
        if "messages" not in prompt:
            return cls(prompt["prompt"], [], [])
        messages = prompt["messages"]
        questions = [place for place, message in enumerate(messages) if message["role"] == "user"]
        if not questions:
            raise ValueError("a conversation without a message of the user cannot be answered")
        return cls("", messages[: questions[0] + 1], [messages[place] for place in questions[1:]])

    def record(self) -> Record:
        if self.said:
            return {"messages": self.said, "finished": self.finished}
        return {"prompt": self.text, "response": self.response, "finished": self.finished}

    def hear(self, response: str, finished: bool) -> None:
        self.response, self.finished = response, finished
        if self.said:
            self.said = [*self.said, {"role": "assistant", "content": response}]


class Answerer:
    """Answers prompts, and conversations turn by turn, which go on with the model's own earlier answers."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sampling: Sampling) -> None:
        self.model, self.tokenizer, self.sampling = model, tokenizer, sampling
        context = int(getattr(model.config, "max_position_embeddings", 2**31))
        self.room = context - sampling.max_new_tokens
        if self.room < 1:
            raise ValueError(
                f"max_new_tokens is {sampling.max_new_tokens}, but the model's context of {context} tokens must hold "
                "the prompt as well: ask for shorter answers"
            )

    def fits(self, prompt: Record) -> bool:
        """Whether there is something to answer, and room for it."""
        return 1 <= self.length(prompt) <= self.room

    def length(self, prompt: Record) -> int:
        """Tokens of what is answered first."""
        return len(self._ids(_Dialogue.of(prompt)))

    def answer(self, prompts: Sequence[Record], seeds: Sequence[int]) -> list[Record]:
        """A record for each prompt, with its `response`, or with `messages` up to the last answered question.

        `finished` tells whether the last answer came to its end before the limit.
        """
        dialogues = [_Dialogue.of(prompt) for prompt in prompts]
        active, turn = list(zip(dialogues, seeds, strict=True)), 0
        while active:
            answers = self._generate(
                [self._ids(dialogue) for dialogue, _ in active], [derive_seed(seed, turn) for _, seed in active]
            )
            for (dialogue, _), (response, finished) in zip(active, answers, strict=True):
                dialogue.hear(response, finished)
            active = [(dialogue, seed) for dialogue, seed in active if self._goes_on(dialogue)]
            turn += 1
        return [dialogue.record() for dialogue in dialogues]

    def _goes_on(self, dialogue: _Dialogue) -> bool:
        """Puts the next question, if there is one and it fits."""
        if not dialogue.rest or not dialogue.finished:
            return False
        asked = replace(dialogue, said=[*dialogue.said, dialogue.rest[0]])
        if len(self._ids(asked)) > self.room:
            return False
        dialogue.said, dialogue.rest = asked.said, dialogue.rest[1:]
        return True

    def _ids(self, dialogue: _Dialogue) -> list[int]:
        if not dialogue.said:
            return list(self.tokenizer(dialogue.text, add_special_tokens=False, verbose=False).input_ids)
        encoded = self.tokenizer.apply_chat_template(
            dialogue.said, tokenize=True, return_dict=True, add_generation_prompt=True
        )
        return list(encoded["input_ids"])

    @torch.no_grad()
    def _generate(self, prompts: list[list[int]], seeds: list[int]) -> list[tuple[str, bool]]:
        tokenizer, device = self.tokenizer, self.model.device
        batch = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(device)
        out = self.model.generate(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], do_sample=False,
            max_new_tokens=self.sampling.max_new_tokens, pad_token_id=tokenizer.pad_token_id,
            logits_processor=self._processors(seeds), past_key_values=give_room(DynamicCache(config=self.model.config)),
            **_GREEDY,
        )  # fmt: skip
        ends = self._ends()
        answers = []
        for row in out[:, batch["input_ids"].shape[1] :].tolist():
            stop = next((place for place, token in enumerate(row) if token in ends), None)
            text = tokenizer.decode(row[:stop], skip_special_tokens=True)
            # A cut answer may end inside a character.
            answers.append((text if stop is not None else text.rstrip("\ufffd"), stop is not None))
        return answers

    def _processors(self, seeds: list[int]) -> LogitsProcessorList:
        chosen, sampling = LogitsProcessorList(), self.sampling
        if sampling.temperature > 0:
            chosen.append(TemperatureLogitsWarper(sampling.temperature))
            if sampling.top_p < 1:
                chosen.append(TopPLogitsWarper(sampling.top_p))
            chosen.append(SeededChoice(seeds, self.model.device))
        return chosen

    def _ends(self) -> set[int]:
        end = self.model.generation_config.eos_token_id
        ends = {end} if isinstance(end, int) else set(end or ())
        return ends | ({self.tokenizer.eos_token_id} - {None})


# What a model's own generation settings may ask for is none of the distribution that is to be learned.
_GREEDY: dict[str, Any] = {"temperature": None, "top_p": None, "top_k": None, "repetition_penalty": None}
