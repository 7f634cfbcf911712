"""After every commit the cache is that of plain decoding; nodes see their own path only."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, StaticCache

from modules.decode_host import Tree, attach_drafter
from modules.decode_host.backbone import Backbone
from modules.decode_host.cache import keep_rows, set_columns
from modules.medusa.output_layer import features
from tests.tiny_decode import TREES, VOCABULARY, Knowing, Ragged, Random, plain, prompts, texts, tiny_model

GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 16}


def fresh(model: Any, ids: list[int]) -> list[tuple[Tensor, Tensor]]:
    """Keys and values [H, T, D] of each layer from one forward of the ids, sliding layers in full."""
    cache = DynamicCache()
    with torch.no_grad():
        model(torch.tensor([ids]), past_key_values=cache)
    return [(layer.keys[0], layer.values[0]) for layer in cache.layers]


@pytest.mark.parametrize("kind", ["llama", "phi", "qwen2_sliding"])
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("batch", [1, 3])
def test_3_after_every_commit_the_cache_is_a_fresh_one(
    kind: str, static: bool, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "qwen2_sliding" and static:
        pytest.skip("sliding static layers are refused")
    model, inputs = tiny_model(kind), prompts(batch)
    known = texts(inputs, plain(model, **inputs, **GREEDY))
    starts = [9 + 16 - len(text) for text in known]
    want = [fresh(model, text) for text in known]
    commits, lengths = [], set()
    commit = Backbone.commit

    def watched(self: Backbone, paths: Any, active: Any) -> None:
        commit(self, paths, active)
        for row, start in enumerate(starts):
            length = self.lengths[row]
            if static and not active[row]:
                continue  # those who lag may write over it
            for layer, (keys, values) in zip(self.cache.layers, want[row], strict=True):
                for got, rows in ((layer.keys, keys), (layer.values, values)):
                    torch.testing.assert_close(
                        got[row, :, start:length], rows[:, : length - start], atol=1e-5, rtol=1e-5
                    )
        assert int(self.cache.get_seq_length()) == self.columns
        commits.append(paths)
        lengths.add(tuple(self.lengths))

    monkeypatch.setattr(Backbone, "commit", watched)
    extra = {"cache_implementation": "static"} if static else {}
    for drafter in (Knowing(TREES["dense"], known), Ragged(known), Knowing(TREES["wide"], known)):
        with attach_drafter(model, drafter):
            model.generate(**inputs, **GREEDY, **extra)
    assert any(list(path) != list(range(len(path))) for paths in commits for path in paths), "nothing ever moved"
    assert batch == 1 or any(len(set(each)) > 1 for each in lengths), "all rows grew alike"


def start(model: Any, ids: Tensor, cache: Any, room: int, layers: tuple[int, ...] = ()) -> Backbone:
    backbone = Backbone(model, True, layers)
    config = GenerationConfig(max_length=ids.shape[1] + room)
    config._mask_length = ids.shape[1]
    positions = torch.arange(ids.shape[1])[None].expand(len(ids), -1)
    with torch.no_grad(), backbone.decoding():
        backbone.prefill(ids, config, {"past_key_values": cache, "position_ids": positions, "use_cache": True})
    return backbone


@pytest.mark.parametrize("kind", ["llama", "qwen2_sliding", "mistral_sliding", "phi"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("tree", ["chain", "dense", "sixty_four"])
def test_4_each_nodes_state_is_that_of_its_path_alone(kind: str, attention: str, tree: str) -> None:
    """Also where a window ends between committed rows; a missing mask or wrong position shows."""
    model, ids, shape = tiny_model(kind, attention), prompts(1, length=14)["input_ids"], TREES[tree]
    backbone = start(model, ids, DynamicCache(config=model.config), 100)
    tokens = torch.randint(0, VOCABULARY, (1, len(shape)), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), backbone.decoding():
        logits = backbone(tokens, shape.tables(torch.device("cpu")))
    hidden = backbone.hidden
    assert hidden is not None and hidden.shape == (1, len(shape), 32)
    for node, path in enumerate(shape.paths):
        with torch.no_grad():
            alone = model(torch.cat([ids, tokens[:, list(path)]], dim=1)).logits[0, -1]
        torch.testing.assert_close(logits[0, node], alone, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model.get_output_embeddings()(hidden), logits)


@pytest.mark.parametrize("kind", ["llama", "qwen2_sliding", "phi"])
def test_layers_outputs_are_those_of_the_text_alone(kind: str) -> None:
    """In the prompt's last row, and in every node of a tree."""
    model, ids, shape = tiny_model(kind), prompts(1, length=14)["input_ids"], TREES["dense"]
    backbone = start(model, ids, DynamicCache(config=model.config), 100, layers=(1, 2))
    last = backbone.hidden
    assert last is not None and last.shape == (1, 1, 96)
    torch.testing.assert_close(last, features(model, (1, 2), input_ids=ids)[:, -1:], atol=1e-4, rtol=1e-4)
    tokens = torch.randint(0, VOCABULARY, (1, len(shape)), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), backbone.decoding():
        backbone(tokens, shape.tables(torch.device("cpu")))
    assert backbone.hidden is not None
    for node, path in enumerate(shape.paths):
        with torch.no_grad():
            alone = features(model, (1, 2), input_ids=torch.cat([ids, tokens[:, list(path)]], dim=1))[0, -1]
        torch.testing.assert_close(backbone.hidden[0, node], alone, atol=1e-4, rtol=1e-4)
    assert not any(module._forward_hooks for module in model.modules()), "a hook is left"


def test_layers_outputs_are_what_transformers_says_they_are() -> None:
    model, ids = tiny_model("llama"), prompts(1, length=14)["input_ids"]
    with torch.no_grad():
        said = model.model(ids, output_hidden_states=True)
        last, first, second = features(model, (1, 2), input_ids=ids).split(32, dim=-1)
    torch.testing.assert_close(last, said.last_hidden_state)
    torch.testing.assert_close(first, torch.nn.functional.rms_norm(said.hidden_states[1], (32,)))
    # Behind the last layer comes the model's own norm, with a weight.
    torch.testing.assert_close(second * model.model.norm.weight, said.last_hidden_state, atol=1e-3, rtol=1e-3)


def test_layers_that_a_model_does_not_have_are_refused() -> None:
    model, ids = tiny_model("llama"), prompts(1)["input_ids"]
    with pytest.raises(ValueError, match=r"layers is \[1, 9\], but a LlamaForCausalLM has layers 1 to 2"):
        start(model, ids, DynamicCache(config=model.config), 8, layers=(1, 9))


def test_rows_that_were_rejected_are_gone_and_a_step_may_be_taken_back() -> None:
    model, ids = tiny_model(), prompts(1)["input_ids"]
    tree, cpu = TREES["dense"], torch.device("cpu")
    tokens = torch.arange(len(tree))[None]
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=80)):
        backbone = start(model, ids, cache, 40)
        before = [layer.keys[:, :, :9].clone() for layer in cache.layers]
        with torch.no_grad():
            first = backbone(tokens, tree.tables(cpu))
            backbone.commit([(0, 2)], [True])
            assert backbone.columns == int(cache.get_seq_length()) == 11
            backbone.rewind(2)
            again = backbone(tokens, tree.tables(cpu))
        assert torch.equal(first, again)
        assert all(map(torch.equal, before, (layer.keys[:, :, :9] for layer in cache.layers)))


@pytest.mark.parametrize("batch", [1, 3])
def test_rows_move_as_index_select_says(batch: int) -> None:
    columns, lengths = 7, [7, 5, 6][:batch]
    paths = [(0, 3, 4), (0,), ()][:batch]
    cache = DynamicCache()
    torch.manual_seed(0)
    for layer in range(2):
        cache.update(torch.randn(batch, 2, 12, 4), torch.randn(batch, 2, 12, 4), layer)
    want = [layer.keys.clone() for layer in cache.layers]
    keep_rows(cache, columns, lengths, paths)
    set_columns(cache, 10)
    for layer, before in zip(cache.layers, want, strict=True):
        assert layer.keys.shape[2] == 10
        for row, (length, path) in enumerate(zip(lengths, paths, strict=True)):
            kept = torch.tensor([*range(length), *(columns + node for node in path)])
            assert torch.equal(layer.keys[row, :, : len(kept)], before[row].index_select(1, kept))


def test_sliding_layers_never_push_committed_rows_out() -> None:
    """A window of 12 behind 9 tokens: the first tree alone would fill it with rows that are rejected."""
    model, inputs = tiny_model("mistral_sliding"), prompts(1)
    known = texts(inputs, plain(model, **inputs, do_sample=False, max_new_tokens=60))
    for right in (0, 1, 99):
        with attach_drafter(model, Knowing(TREES["sixty_four"], known, right)) as handle:
            got = model.generate(**inputs, do_sample=False, max_new_tokens=60, return_dict_in_generate=True)
        assert got.sequences[0].tolist() == known[0] and handle.counts.nodes > 64
        assert got.past_key_values.get_seq_length() == 9 + 59


@pytest.mark.parametrize("kind", ["llama", "qwen2", "phi"])
def test_a_tree_of_one_is_plain_decoding_bit_for_bit(kind: str) -> None:
    model, inputs = tiny_model(kind), prompts(1)
    call = {**inputs, **GREEDY, "return_dict_in_generate": True, "output_logits": True}
    want = plain(model, **call)
    with attach_drafter(model, Knowing(Tree.chain(0), [[]])):
        got = model.generate(**call)
    assert all(map(torch.equal, got.logits, want.logits))


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_what_comes_back_may_be_written_to_and_trained_through(kind: str) -> None:
    """Steps run without autograd's books, which must not show in what outlives them."""
    model, inputs = tiny_model(), prompts(1)
    call = GREEDY | {"max_new_tokens": 120, "cache_implementation": kind}
    with attach_drafter(model, Random(TREES["dense"])):
        out = model.generate(**inputs, **call, return_dict_in_generate=True, output_scores=True, output_logits=True)
    held = [tensor for layer in out.past_key_values.layers for tensor in (layer.keys, layer.values)]
    for tensor in [out.sequences, *out.scores, *out.logits, *held]:
        assert not tensor.is_inference()
        tensor.add_(0)
    weight = torch.ones((), requires_grad=True)
    sum((weight * tensor).sum() for tensor in [*out.scores, *held]).backward()
    assert weight.grad is not None
