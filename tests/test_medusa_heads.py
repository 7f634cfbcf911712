"""Medusa's heads: they start as the backbone's own, whatever the model, and stacked they are the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from modules.decode_host import DraftState
from modules.medusa.chunked import chunked_sum
from modules.medusa.config import READS, MedusaConfig
from modules.medusa.drafter import DynamicMedusaDrafter, MedusaDrafter
from modules.medusa.heads import MedusaHeads
from modules.medusa.output_layer import OutputLayer, features, last_hidden_state
from modules.medusa.stacked import StackedHeads

V, D = 40, 16
SIZES: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
MODELS: dict[str, tuple[type, type, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "llama tied": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 8}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": 4}),
    "phi with an output bias": (PhiConfig, PhiForCausalLM, {}),
    "phi3": (Phi3Config, Phi3ForCausalLM, {}),
    "gemma2 with a soft cap": (Gemma2Config, Gemma2ForCausalLM, {"head_dim": 8, "final_logit_softcapping": 5.0}),
    "cohere with a factor": (CohereConfig, CohereForCausalLM, {}),
    "granite with a divisor": (GraniteConfig, GraniteForCausalLM, {"logits_scaling": 4.0}),
}
DRAFTED = torch.tensor([1, 5, 7, 2, 9, 11, 30, 39])


def small(name: str) -> Any:
    config, model, changes = MODELS[name]
    torch.manual_seed(0)
    made = model(config(**{**SIZES, "initializer_range": 0.3, **changes})).eval().requires_grad_(False)
    if (bias := getattr(made.lm_head, "bias", None)) is not None:
        nn.init.normal_(bias)
    return made


def heads_for(
    layer: OutputLayer,
    vocabulary: str = "own",
    num_heads: int = 3,
    num_blocks: int = 1,
    reads: str = "state",
    layers: Sequence[int] = (),
) -> MedusaHeads:
    """Heads as a training begins with them."""
    config = MedusaConfig(
        hidden_size=layer.weight.shape[1],
        vocab_size=layer.weight.shape[0],
        num_heads=num_heads,
        num_blocks=num_blocks,
        vocabulary=vocabulary,
        draft_vocab_size=len(DRAFTED) if vocabulary == "pruned" else None,
        rank=4 if vocabulary == "low_rank" else None,
        reads=reads,
        layers=list(layers),
        output_bias=vocabulary in ("own", "pruned") and layer.bias is not None,
    )
    return MedusaHeads(config).start_from(layer, DRAFTED if vocabulary == "pruned" else None)


def scramble(heads: MedusaHeads, seed: int = 1) -> MedusaHeads:
    """Heads that are nobody's copy."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return heads


@pytest.fixture(scope="module")
def layer() -> OutputLayer:
    return OutputLayer.of(small("llama"))


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_every_head_starts_as_the_backbones_own(name: str) -> None:
    model = small(name)
    layer = OutputLayer.of(model)
    ids = torch.randint(0, V, (2, 7), generator=torch.Generator().manual_seed(1))
    hidden, want = last_hidden_state(model, input_ids=ids), model(input_ids=ids).logits
    for vocabulary in ("own", "tied", "low_rank"):
        for reads in READS:
            heads, path = heads_for(layer, vocabulary, num_blocks=2, reads=reads), ids[..., None].expand(-1, -1, 3)
            assert all(torch.equal(heads(hidden, layer, head, path=path), want) for head in range(3)), vocabulary
            heads, wide = (
                heads_for(layer, vocabulary, reads=reads, layers=[1, 2]),
                features(model, [1, 2], input_ids=ids),
            )
            assert wide.shape[-1] == 3 * D and torch.equal(wide[..., :D], hidden)
            assert all(torch.equal(heads(wide, layer, head, path=path), want) for head in range(3)), vocabulary
    pruned = heads_for(layer, "pruned")
    torch.testing.assert_close(pruned(hidden, layer, 0), want[..., DRAFTED])


@pytest.mark.parametrize("name", ["phi with an output bias", "gemma2 with a soft cap", "granite with a divisor"])
@torch.no_grad()
def test_logits_of_some_tokens_are_those_of_all(name: str) -> None:
    layer, hidden = OutputLayer.of(small(name)), torch.randn(3, D)
    want = layer.logits(hidden)
    torch.testing.assert_close(layer.logits_among(DRAFTED)(hidden), want[:, DRAFTED])
    assert torch.equal(layer.logits_among(None)(hidden), want)
    other = type("Changed", (nn.Linear,), {})(D, V, bias=layer.bias is not None)
    changed = OutputLayer(other, layer.scale, layer.soft_cap)
    torch.testing.assert_close(changed.logits_among(DRAFTED)(hidden), changed.logits(hidden)[:, DRAFTED])


def test_a_model_whose_logits_are_another_function_is_refused() -> None:
    class Odd(LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = output.logits.square()
            return output

    model = Odd(LlamaConfig(**SIZES)).eval()
    with pytest.raises(ValueError, match="no known function of its last hidden state"):
        OutputLayer.of(model)
    model = small("llama")
    model.lm_head.register_forward_pre_hook(lambda _, args: (args[0] / 2,))
    with pytest.raises(ValueError, match="something else than its last hidden state"):
        OutputLayer.of(model)
    with pytest.raises(ValueError, match="no output matrix"):
        OutputLayer.of(nn.Linear(2, 2))


@pytest.mark.parametrize("vocabulary", ["own", "tied", "pruned", "low_rank"])
def test_blocks_of_a_head_are_different_tensors_and_all_learn(layer: OutputLayer, vocabulary: str) -> None:
    heads = heads_for(layer, vocabulary, num_heads=2, num_blocks=2, reads="path")
    storages = [parameter.data_ptr() for parameter in heads.parameters()]
    assert len(set(storages)) == len(storages)
    scramble(heads)
    hidden = torch.randn(5, D)
    path = torch.arange(10).view(5, 2)
    sum(heads(hidden, layer, head, path=path).square().sum() for head in range(2)).backward()
    assert all(parameter.grad is not None and bool(parameter.grad.any()) for parameter in heads.parameters())
    first, second = (block.linear.weight.grad for block in heads.heads[0].blocks)
    assert not torch.equal(first, second)
    assert layer.weight.grad is None


def test_copies_are_copies(layer: OutputLayer) -> None:
    heads = heads_for(layer)
    before = layer.weight.clone()
    scramble(heads)
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("reads", READS)
@pytest.mark.parametrize("vocabulary", ["own", "tied", "pruned", "low_rank"])
@pytest.mark.parametrize("name", ["llama", "phi with an output bias", "gemma2 with a soft cap"])
@pytest.mark.parametrize("layers", [(), (1, 2)])
@torch.no_grad()
def test_stacked_heads_are_the_heads(name: str, vocabulary: str, reads: str, layers: tuple[int, ...]) -> None:
    layer = OutputLayer.of(small(name))
    heads = scramble(heads_for(layer, vocabulary, num_blocks=2, reads=reads, layers=layers))
    stacked, path = StackedHeads(heads, layer), torch.arange(12).view(4, 3)
    hidden = torch.randn(4, (1 + len(layers)) * D) / (1 + len(layers))  # far from where a soft cap makes ties
    dense = torch.stack([heads(hidden, layer, head, path=path) for head in range(3)])
    torch.testing.assert_close(stacked.logits(hidden, path_BR=path), dense)
    torch.testing.assert_close(stacked.logits(hidden, slice(2), path[:, :2]), dense[:2])
    chances, tokens = stacked.top(hidden, 5, path_BR=path)
    want = dense.log_softmax(-1).topk(5)
    torch.testing.assert_close(chances, want.values)
    ids = want.indices if vocabulary != "pruned" else DRAFTED[want.indices]
    assert torch.equal(tokens, ids) and torch.equal(stacked.tokens(hidden, 5, path_BR=path), ids)
    own = sum(parameter.nbytes for parameter in heads.parameters())
    named, scales = DRAFTED.nbytes if vocabulary == "pruned" else 0, 0 if reads == "state" else 4 * V
    assert stacked.memory_bytes() == own + named + scales


@torch.no_grad()
def test_heads_guess_by_what_they_read_and_by_nothing_else(layer: OutputLayer) -> None:
    hidden, path = torch.randn(1, D).expand(3, D), torch.tensor([[3, 4], [3, 5], [6, 4]])
    for reads, alike in (("state", [[0, 1, 2]] * 2), ("root", [[0, 1], [0, 1]]), ("path", [[0, 1], [0]])):
        heads = scramble(heads_for(layer, num_heads=2, reads=reads))
        for head, same in enumerate(alike):
            logits = heads(hidden, layer, head, path=path)
            equal = [row for row in range(3) if torch.allclose(logits[row], logits[0])]
            assert equal == same, (reads, head)
    for use in (lambda: heads(hidden, layer, 1), lambda: heads(hidden, layer, 1, path=path[:, :1])):
        with pytest.raises(ValueError, match="this head reads 2 tokens after the state, and [01] are given"):
            use()


@pytest.mark.parametrize("vocabulary", ["own", "tied", "low_rank"])
@torch.no_grad()
def test_heads_that_read_the_path_are_one_cell_however_many(layer: OutputLayer, vocabulary: str) -> None:
    few, many = (scramble(heads_for(layer, vocabulary, count, reads="path")) for count in (2, 5))
    assert few.state_dict().keys() == many.state_dict().keys()
    assert all(map(torch.equal, few.parameters(), many.parameters()))
    hidden, path = torch.randn(3, D), torch.randint(0, V, (3, 5))
    assert torch.equal(few(hidden, layer, 1, path=path), many(hidden, layer, 1, path=path))
    states = None
    for head in range(5):  # going on from the head before is the same as beginning anew
        states = many.states(hidden, layer, head, path, states)
        torch.testing.assert_close(states, many.states(hidden, layer, head, path))
        torch.testing.assert_close(many.guesses(states, layer, head), many(hidden, layer, head, path=path))


CHOICES = [(0,), (1,), (0, 0), (0, 2), (1, 0), (0, 2, 1), (1, 0, 0), (0, 0, 3)]


@pytest.mark.parametrize("layers", [(), (2,)])
@pytest.mark.parametrize("reads", READS)
@torch.no_grad()
def test_every_node_is_what_its_head_guesses_below_its_parent(
    layer: OutputLayer, reads: str, layers: tuple[int, ...]
) -> None:
    heads = scramble(heads_for(layer, reads=reads, layers=layers))
    drafter = MedusaDrafter(StackedHeads(heads, layer), CHOICES)
    assert tuple(drafter.hidden_layers) == layers
    hidden, root = torch.randn(2, (1 + len(layers)) * D), torch.tensor([7, 3])
    draft = drafter.propose(DraftState([[7], [3]], root, hidden, [True] * 2, 9))
    for row in range(2):
        token: dict[tuple[int, ...], int] = {}
        for choice in drafter.choices:
            before = [int(root[row]), *(token[choice[:depth]] for depth in range(1, len(choice)))]
            logits = heads(hidden[row], layer, len(choice) - 1, path=torch.tensor(before))
            token[choice] = int(logits.topk(4).indices[choice[-1]])
        assert draft.tokens[row].tolist() == [token[choice] for choice in drafter.choices]


@pytest.mark.parametrize("layers", [(), (2,)])
@pytest.mark.parametrize("reads", READS)
@torch.no_grad()
def test_a_tree_of_the_steps_own_has_the_heads_guesses_and_their_chances(
    layer: OutputLayer, reads: str, layers: tuple[int, ...]
) -> None:
    heads = scramble(heads_for(layer, reads=reads, layers=layers))
    hidden, root = torch.randn(2, (1 + len(layers)) * D), torch.tensor([7, 3])
    draft = DynamicMedusaDrafter(StackedHeads(heads, layer), 7, 3).propose(
        DraftState([[7], [3]], root, hidden, [True] * 2, 9)
    )
    assert draft.chance is not None and draft.tokens.shape == (2, 7)
    for row in range(2):
        tree, path, chance = draft.tree_of(row), {0: (int(root[row]),)}, {0: 1.0}
        for node, token in enumerate(draft.tokens[row].tolist(), start=1):
            above = tree.parents[node]
            found = heads(hidden[row], layer, tree.depths[node] - 1, path=torch.tensor(path[above])).softmax(-1)
            assert token in found.topk(3).indices
            path[node], chance[node] = (*path[above], token), chance[above] * float(found[token])
            assert draft.chance[row][node - 1] == pytest.approx(chance[node], rel=1e-4)
        assert min(list(chance.values())[1:]) > 0


@torch.no_grad()
def test_the_drafter_puts_each_heads_guesses_at_its_depth(layer: OutputLayer) -> None:
    stacked = StackedHeads(scramble(heads_for(layer)), layer)
    choices = [(0,), (1,), (0, 0), (0, 2), (1, 0), (0, 2, 3)]
    accuracy = [[0.5, 0.2], [0.4, 0.1, 0.05], [0.3]]
    drafter = MedusaDrafter(stacked, choices, accuracy)
    hidden = torch.randn(2, D)
    state = DraftState(rows=[[1], [2]], root=torch.tensor([1, 2]), hidden=hidden, active=[True] * 2, room=9)
    draft = drafter.propose(state)
    _, tokens = stacked.top(hidden, 4)
    want = torch.stack([tokens[len(choice) - 1, :, choice[-1]] for choice in drafter.choices], dim=1)
    assert torch.equal(draft.tokens, want)
    assert drafter.tree.parents == (-1, 0, 0, 1, 1, 2, 4)
    assert draft.chance is not None
    assert draft.chance[0] == pytest.approx([0.5, 0.2, 0.2, 0.025, 0.08, 0.0])


def test_a_tree_that_the_heads_cannot_fill_is_refused(layer: OutputLayer) -> None:
    stacked = StackedHeads(heads_for(layer), layer)
    for choices, words in (
        ([(0,), (0, 0), (0, 0, 0), (0, 0, 0, 0)], "4 deep but there are 3 heads"),
        ([(0,), (1, 0)], "has no parent"),
        ([(0,), (V,)], f"rank {V + 1} but a head tells {V} tokens apart"),
    ):
        with pytest.raises(ValueError, match=words):
            MedusaDrafter(stacked, choices)
    assert len(MedusaDrafter(stacked, []).tree) == 1


@pytest.mark.parametrize("rows", [1, 4, 7, 100])
def test_a_sum_over_chunks_has_the_gradients_of_the_whole(rows: int) -> None:
    torch.manual_seed(0)
    weight, targets = nn.Parameter(torch.randn(V, D)), torch.randint(0, V, (10,))
    states = torch.randn(10, D, requires_grad=True)
    seen = []

    def reduce(logits: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        seen.append(len(logits))
        return nn.functional.cross_entropy(logits, targets[part], reduction="sum"), torch.tensor([len(logits)])

    total, figures = chunked_sum(lambda u: u @ weight.T, reduce, states, [weight], rows)
    (total / 3).backward()
    got = states.grad.clone(), weight.grad.clone()
    states.grad = weight.grad = None
    want = nn.functional.cross_entropy(states @ weight.T, targets, reduction="sum")
    (want / 3).backward()
    torch.testing.assert_close(total, want)
    torch.testing.assert_close(got, (states.grad, weight.grad))
    assert max(seen) <= rows and figures.tolist() == [10]
    with torch.no_grad():
        torch.testing.assert_close(chunked_sum(lambda u: u @ weight.T, reduce, states, [weight], rows)[0], want)


def test_no_state_at_all_still_gives_every_parameter_a_gradient() -> None:
    weight = nn.Parameter(torch.randn(V, D))
    reduce = lambda logits, part: (logits.sum(), torch.zeros(1))  # noqa: E731
    chunked_sum(lambda u: u @ weight.T, reduce, torch.zeros(0, D, requires_grad=True), [weight], 4)[0].backward()
    assert weight.grad is not None and not bool(weight.grad.any())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vocabulary": "shared"}, "not one of own, tied, pruned, low_rank"),
        ({"num_heads": 0}, "num_heads is 0"),
        ({"layers": [2, 1]}, r"layers is \[2, 1\]: name each layer once"),
        ({"layers": [0]}, r"layers is \[0\]: name each layer once"),
        ({"draft_vocab_size": 4}, "draft_vocab_size is 4 with vocabulary tied"),
        ({"vocabulary": "pruned", "draft_vocab_size": V + 1}, "not within 1 to 40"),
        ({"vocabulary": "low_rank"}, "rank is None"),
        ({"hits": [[1]], "counts": [2]}, "but there are 4"),
    ],
)
def test_a_config_that_cannot_be_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        MedusaConfig(**{"hidden_size": D, "vocab_size": V, **changes})


def test_heads_of_another_shape_are_refused(layer: OutputLayer) -> None:
    config = MedusaConfig(hidden_size=D, vocab_size=V + 1)
    with pytest.raises(ValueError, match="know 41 tokens, but the backbone gives 16 and 40"):
        MedusaHeads(config).start_from(layer)
