"""Medusa on the tiny Llama: what is compared is the text, and what was guessed on the way to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from modules.language_models import load_model, load_tokenizer
from modules.medusa.output_layer import last_hidden_state
from tests.contract_cases.interface import ContractCase
from tests.tiny_language import tiny_llama
from tests.tiny_medusa import save_tiny, tiny_recipe
from trainers.medusa.task import MedusaTask

NEW = 24


def case(folder: Path) -> ContractCase:
    """The method's case; `folder` is empty and lasts as long as the test."""
    name = save_tiny(folder)
    prompt = load_tokenizer(name)("cafe", return_tensors="pt").input_ids

    def outputs(model: Any, handle: Any) -> Tensor:
        """The text, and the guesses of every step; without a drafter there are none."""
        drafts: list[Tensor] = []
        if handle is not None:
            propose = handle.drafter.propose
            handle.drafter.propose = lambda state: drafts.append((draft := propose(state)).tokens[0]) or draft
        try:
            ids = model.generate(input_ids=prompt, max_new_tokens=NEW, do_sample=False)[0]
        finally:
            if handle is not None:
                del handle.drafter.propose
        return torch.cat([ids, *drafts])

    def graph_outputs(task: MedusaTask) -> Tensor:
        """The same by the training graph and by hand: walk the plain text, guess at every stop."""
        ids = LlamaForCausalLM.generate(task.model, prompt, max_new_tokens=NEW, do_sample=False)[0]
        choices = task.calibrated().tree
        ordered = sorted(map(tuple, choices), key=lambda choice: (len(choice), choice))
        place, drafts = prompt.shape[1], []  # the root's; the state before it guesses what follows it
        while place + 2 < len(ids):  # where only one token is missing nothing is guessed
            hidden = last_hidden_state(task.model, input_ids=ids[None, :place])[0, -1]
            guess: dict[tuple[int, ...], int] = {}
            for choice in ordered:
                before = [int(ids[place]), *(guess[choice[:depth]] for depth in range(1, len(choice)))]
                logits = task.learned.heads(hidden, task.layer, len(choice) - 1, path=torch.tensor(before))
                guess[choice] = int(logits.topk(4).indices[choice[-1]])
            drafts += [torch.tensor([guess[choice] for choice in ordered])]
            path: tuple[int, ...] = ()
            while place + 1 + len(path) < len(ids):
                came = int(ids[place + 1 + len(path)])
                below = [choice for choice in ordered if choice[:-1] == path and len(choice) == len(path) + 1]
                path, before = next((choice for choice in below if guess[choice] == came), path), path
                if path == before:
                    break
            place += len(path) + 1
        return torch.cat([ids, *drafts])

    def work(model: Any, handle: Any) -> float:
        """Backbone calls for a text."""
        calls = []
        hook = model.model.register_forward_pre_hook(lambda *_: calls.append(1))
        model.generate(input_ids=prompt, max_new_tokens=NEW, do_sample=False)
        hook.remove()
        return float(len(calls))

    def other(**settings: Any) -> Any:
        """Attaching to a model that differs."""
        return lambda load: load(tiny_llama(**settings))

    def twice(load: Any) -> None:
        model, _ = load_model(name)
        load(model)
        load(model)

    return ContractCase(
        recipe=tiny_recipe(name, module__reads="path"),
        target=lambda: load_model(name)[0],
        outputs=outputs,
        graph_outputs=graph_outputs,
        make_neutral=lambda handle: handle.medusa.use_tree([]),
        work=work,
        misfits={
            "num_hidden_layers 2 (here 3)": other(layers=3),
            "hidden_size 32 (here 64)": other(hidden=64),
            "fingerprint": other(seed=1),
            "generate is replaced already": twice,
        },
    )
