"""Trees run through the compiled step that transformers has for static caches, and see what they see without it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import CompileConfig

from modules.contracts import Drafter
from modules.decode_host import Draft, DraftState, attach_drafter
from tests.tiny_decode import GREEDY, TREES, Random, plain, prompts, tiny_model


class Watching(Drafter):
    """Guesses the same tokens every time, and keeps the features that it is shown."""

    needs_hidden = True

    def __init__(self, layers: tuple[int, ...] = ()) -> None:
        self.tree, self.hidden_layers, self.seen = TREES["dense"], layers, list[torch.Tensor]()

    def propose(self, state: DraftState) -> Draft:
        assert state.hidden is not None
        self.seen.append(state.hidden.clone())
        return Draft(self.tree, torch.arange(len(self.tree) - 1)[None].expand(len(state.rows), -1))

    def memory_bytes(self) -> int:
        return 0


GRAPHS: list[torch.fx.GraphModule] = []


def counted(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
    """A compiler that runs graphs as they are.  Not an object: `generate` copies its arguments."""
    GRAPHS.append(graph)
    return graph.forward


@pytest.fixture
def call() -> Iterator[dict[str, Any]]:
    """Arguments of `generate` that compile a step."""
    torch._dynamo.reset()
    GRAPHS.clear()
    config = CompileConfig(backend=counted, mode=None)
    config._compile_all_devices = True
    yield {"cache_implementation": "static", "compile_config": config}
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral", "phi"])
@pytest.mark.parametrize("layers", [(), (1,)], ids=["last", "other_layers"])
def test_a_compiled_step_shows_drafters_what_a_plain_one_does(
    call: dict[str, Any], kind: str, layers: tuple[int, ...]
) -> None:
    model, inputs = tiny_model(kind), prompts(1)
    eager, compiled = Watching(layers), Watching(layers)
    with attach_drafter(model, eager):
        want = model.generate(**inputs, **GREEDY, cache_implementation="static")
    with attach_drafter(model, compiled):
        got = model.generate(**inputs, **GREEDY, **call)
    assert GRAPHS and torch.equal(got, want)
    assert len(compiled.seen) == len(eager.seen)
    for mine, its in zip(compiled.seen, eager.seen, strict=True):
        torch.testing.assert_close(mine, its)


def test_one_size_of_tree_is_compiled_whatever_the_text_is_like(call: dict[str, Any]) -> None:
    """The trees at a text's end, cut to what is missing, are not: each size would be compiled anew."""
    model = tiny_model()
    rows, graphs = list[int](), list[int]()
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        with attach_drafter(model, Random(TREES["dense"])):
            for length in (5, 9, 7, 12):
                model.generate(input_ids=torch.arange(length)[None], **GREEDY, **call)
                graphs.append(len(GRAPHS))
    finally:
        hook.remove()
    assert graphs == [1, 2, 2, 2]  # the second length is the first that shows it may change
    assert len(set(rows) - {5, 7, 9, 12}) > 2


def test_the_text_is_that_of_plain_compiled_decoding_one_after_the_other(call: dict[str, Any]) -> None:
    model, inputs = tiny_model(), prompts(1)
    for _ in range(2):  # each finds what the other has compiled
        want = plain(model, **inputs, **GREEDY, **call)
        with attach_drafter(model, Watching((1,))) as handle:
            assert torch.equal(model.generate(**inputs, **GREEDY, **call), want)
        assert handle.counts.steps
