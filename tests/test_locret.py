"""Retaining heads: what they are taught, that they never look ahead, and that they keep what will be asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data.contexts import AnsweredPrompts, TextWindows
from data.needle import ASK, ASKED_KEYS, KEYS, MARKERS, NOISE, VALUES, Needles, copy_rows, needle_rows
from data.text import IGNORED, TokenDocument, TokenStream
from modules.kv_host import CachePolicy, attach_cache, attention_sites
from modules.language_models import load_model
from modules.locret import (
    LocretConfig,
    LocretHandle,
    LocretSelector,
    RetainingHeads,
    causal_importance,
    features_and_labels,
    features_while_evicting,
)
from modules.token_selectors import ExpectedAttention, Random
from tests.tiny_kv import save_tiny, tiny_recipe
from tests.tiny_kv_models import CONFIGS, some_ids, tiny_model
from trainers.contexts import held_out_rows
from trainers.kv_cases import CacheCase, baseline_case, quality_of
from trainers.kv_rivals import HandleReader
from trainers.locret.evaluation import own_cases
from trainers.locret.task import overlap, retaining_loss
from trainers.recipes import compose_recipe
from trainers.run_folder import RunFolder
from trainers.training import build_task, train


def heads_for(model: Any, hidden: int = 16, seed: int = 0) -> RetainingHeads:
    torch.manual_seed(seed)
    site = attention_sites(model)[0]
    sizes = {"query_heads": site.query_heads, "kv_heads": site.kv_heads, "head_dim": site.head_dim}
    config = LocretConfig(num_layers=2, hidden_size=hidden, **sizes)
    return RetainingHeads(config).requires_grad_(False)


# Labels and loss.


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
def test_labels_are_the_largest_logits_of_the_answer(family: str) -> None:
    """Against attention weights of eager attention: a row's logits are its log weights up to a constant per row."""
    model, ids, prompt = tiny_model(family), some_ids(2, 30), 22
    found = features_and_labels(model, attention_sites(model), ids, prompt)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        out = model(ids, output_attentions=True)
    for (features, labels), weights, site in zip(found, out.attentions, attention_sites(model), strict=True):
        logits = brute_force(model, site, features_of_all(model, site, ids))
        torch.testing.assert_close(weights, logits.masked_fill(later(30), -torch.inf).softmax(-1), rtol=1e-4, atol=1e-5)
        want = logits[:, :, prompt:, :prompt].amax(2).view(2, 2, 2, prompt).amax(2).transpose(1, 2)
        torch.testing.assert_close(labels, want, rtol=0, atol=1e-5)
        assert features.shape == (2, prompt, site.feature_width)
    assert model.config._attn_implementation == "eager"


def later(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).triu(1)


def features_of_all(model: Any, site: Any, ids: Tensor) -> Tensor:
    """Queries and keys of every token, by the projections' own outputs."""
    seen: list[Tensor] = []
    hooks = [part.register_forward_hook(lambda m, a, out: seen.append(out)) for part in site.projections]
    model(ids)
    for hook in hooks:
        hook.remove()
    return torch.cat(seen, dim=-1)


def brute_force(model: Any, site: Any, features: Tensor) -> Tensor:
    """Scaled logits [B, H_q, T, T] after rotation, by transformers' own functions."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    size, module = site.head_dim, site.module
    widths = [site.query_heads * size, site.kv_heads * size, site.kv_heads * size]
    queries, keys, _ = (part.unflatten(-1, (-1, size)) for part in features.split(widths, dim=-1))
    if hasattr(module, "q_norm"):
        queries, keys = module.q_norm(queries), module.k_norm(keys)
    cos, sin = model.model.rotary_emb(features, torch.arange(features.shape[1])[None])
    queries, keys = apply_rotary_pos_emb(queries.transpose(1, 2), keys.transpose(1, 2), cos, sin)
    return queries @ keys.repeat_interleave(2, dim=1).transpose(2, 3) / size**0.5


def test_labels_depend_on_the_answer_and_on_nothing_behind_it() -> None:
    model, ids = tiny_model(), some_ids(1, 30)
    sites = attention_sites(model)
    want = features_and_labels(model, sites, ids, 20)
    changed, longer = ids.clone(), torch.cat([ids, some_ids(1, 5, seed=1)], dim=1)
    changed[0, 25] = (changed[0, 25] + 1) % 90 + 2
    assert not torch.equal(features_and_labels(model, sites, changed, 20)[0][1], want[0][1])
    # What is behind an answer is more answer to the label, so it can only rise.
    more = features_and_labels(model, sites, longer, 20)
    for new, old in zip(more, want, strict=True):
        assert bool((new[1] >= old[1] - 1e-5).all())
        torch.testing.assert_close(new[0], old[0], rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="both it and the answer need some"):
        features_and_labels(model, sites, ids, 30)


def test_importance_is_made_in_blocks_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, keys = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 13, 8)
    whole = causal_importance(queries, keys, 0.3)
    monkeypatch.setattr("modules.locret.labels._BLOCK", 100)
    torch.testing.assert_close(causal_importance(queries, keys, 0.3), whole)


def test_a_question_that_is_read_first_changes_features_but_not_which_tokens_are_labelled() -> None:
    model, ids = tiny_model(), some_ids(1, 30)
    sites = attention_sites(model)
    plain = features_and_labels(model, sites, ids, 20)
    asked = features_and_labels(model, sites, ids, 20, question=ids[:, 16:20])
    assert [f.shape for f, _ in asked] == [f.shape for f, _ in plain]
    torch.testing.assert_close(asked[0][0], plain[0][0], rtol=0, atol=1e-6)  # the first layer reads embeddings only
    assert not torch.allclose(asked[1][0], plain[1][0], atol=1e-3)


def test_features_while_evicting_are_the_plain_ones_until_something_is_gone() -> None:
    model, ids = tiny_model(), some_ids(2, 40)
    heads, plain = heads_for(model), [f for f, _ in features_and_labels(model, attention_sites(model), ids, 36)]
    for budget in (40, 6):
        policy = CachePolicy(budget=budget, chunk=8, stabilizers=2, local=5)
        found = features_while_evicting(model, heads, policy, ids[:, :36])
        torch.testing.assert_close(found[0], plain[0], rtol=0, atol=1e-5)  # the first layer reads embeddings only
        torch.testing.assert_close(found[1][:, :8], plain[1][:, :8], rtol=0, atol=1e-5)
        assert torch.allclose(found[1], plain[1], rtol=0, atol=1e-5) == (budget == 40)
    assert model.config._attn_implementation == "sdpa" and "generate" not in vars(model)


def test_heads_learn_from_what_they_will_find(tmp_path: Path) -> None:
    name = save_tiny(tmp_path)
    losses = []
    for evicting in ("false", "true"):
        task = build_task(tiny_recipe("locret", name, objective__evicting=evicting))
        loss = task.training_step(next(iter(task.train_dataloader())), 0)
        loss.backward()
        assert all(parameter.grad is not None for parameter in task.learned.parameters())
        losses.append(loss.item())
    assert losses[0] != losses[1]
    with pytest.raises(ValueError, match="leave one of them out"):
        tiny_recipe("locret", name, objective__evicting="true", module__query_aware="true")


def test_the_loss_weighs_its_parts_as_the_paper_says() -> None:
    labels = [torch.zeros(1, 4, 2), torch.zeros(1, 4, 2)]
    flat = [torch.full((1, 4, 2), 0.5), torch.full((1, 4, 2), 2.0)]
    loss, regression, steps = retaining_loss(flat, labels, 0.1)
    assert steps == 0 and loss == regression
    assert regression == pytest.approx((0.125 + 1.5) / 2)  # SmoothL1 with beta 1: x²/2 below it, x - 1/2 above
    rising = [torch.arange(4.0)[None, :, None].expand(1, 4, 2), 2 * torch.arange(4.0)[None, :, None].expand(1, 4, 2)]
    loss, regression, steps = retaining_loss(rising, rising, 0.1)
    assert regression == 0 and steps == 1 + 4 and loss == pytest.approx(0.5)  # a sum over the layers, not a mean


def test_overlap_is_the_share_of_the_best_that_is_kept() -> None:
    labels = [torch.arange(20.0)[None, :, None]]
    assert overlap(labels, labels, 0.1) == 1
    assert overlap([-labels[0]], labels, 0.1) == 0
    half = labels[0].clone()
    half[0, 19] = -1
    assert overlap([half], labels, 0.1) == 0.5


# Scores.


def test_scores_are_causal_and_the_same_in_chunks() -> None:
    model, ids = tiny_model(), some_ids(1, 40)
    changed = ids.clone()
    changed[0, 25] = (changed[0, 25] + 1) % 90 + 2
    with attach_cache(model, selector=LocretSelector(heads_for(model))) as handle:
        whole, other, chunks = (
            [layer.units.scores for layer in handle.prefill(which, chunk=chunk).layers]
            for which, chunk in ((ids, None), (changed, None), (ids, 7))
        )
    for one, two, three in zip(whole, other, chunks, strict=True):
        assert torch.equal(one[..., :25], two[..., :25]) and not torch.equal(one[..., 25:], two[..., 25:])
        torch.testing.assert_close(one, three, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", CONFIGS)
def test_heads_read_the_raw_projections_of_any_model(family: str) -> None:
    model, ids = tiny_model(family), some_ids(1, 20)
    site, heads = attention_sites(model)[1], heads_for(model)
    want = heads(features_of_all(model, site, ids), 1).transpose(1, 2)
    with attach_cache(model, selector=LocretSelector(heads)) as handle:
        scores = handle.prefill(ids).layers[1].units.scores
    torch.testing.assert_close(scores, want, rtol=0, atol=1e-6)


def test_a_mismatched_model_is_named() -> None:
    heads = heads_for(tiny_model())
    with pytest.raises(ValueError, match=r"kv_heads 2 \(here 4\): load the adapter made for this backbone"):
        attach_cache(tiny_model("llama without groups"), selector=LocretSelector(heads))
    with pytest.raises(ValueError, match=r"num_layers 2 \(here 3\)"):
        attach_cache(tiny_model(num_hidden_layers=3), selector=LocretSelector(heads))


# Training.


def test_only_heads_have_gradients_and_optimizer_state(tmp_path: Path) -> None:
    task = build_task(tiny_recipe("locret", save_tiny(tmp_path)))
    batch = next(iter(task.train_dataloader()))
    task.training_step(batch, 0).backward()
    assert all(parameter.grad is not None for parameter in task.learned.parameters())
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in task.backbone.parameters())
    optimizer = task.configure_optimizers()["optimizer"]
    optimizer.step()
    state = sum(value["exp_avg"].numel() for value in optimizer.state.values())
    assert state == sum(parameter.numel() for parameter in task.learned.parameters())
    assert not task.backbone.model.layers[0].self_attn.q_proj._forward_hooks


def test_the_papers_schedule_falls_along_a_line(tmp_path: Path) -> None:
    changes = {"optimizer__schedule": "linear", "optimizer__warmup_steps": "2", "trainer__max_steps": "6"}
    task = build_task(tiny_recipe("locret", save_tiny(tmp_path), optimizer__lr="1.0", **changes))
    task._trainer = None
    schedule = task.configure_optimizers()["lr_scheduler"]["scheduler"]
    rates = []
    for _ in range(7):
        rates.append(schedule.get_last_lr()[0])
        schedule.optimizer.step()
        schedule.step()
    assert rates == pytest.approx([0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0])


def test_what_reads_the_question_first_is_measured_so() -> None:
    model, ids = tiny_model(), some_ids(1, 48)
    heads = heads_for(model)
    for first in (False, True):
        policy = asdict(CachePolicy(budget=9, local=5, query_first=first))
        heads.config = replace(heads.config, policy=policy)
        with own_cases(partial(LocretHandle, model, heads), {})[0].enter(48) as reader:
            cache = reader.read(ids, None)
        # A sixteenth of the context, and the question on top where there is one.
        assert cache.units() == [3 + 5 * first] * 2 and cache.get_seq_length() == 48
        assert cache.setting.policy.query_first == first


# Data.


def test_needles_can_be_answered_from_their_context_alone() -> None:
    rows = needle_rows(16, 100, torch.Generator().manual_seed(0), needles=8, questions=5, style="shifted")
    assert rows.input_ids.shape == (16, 115)
    for ids, labels in zip(rows.input_ids.tolist(), rows.labels.tolist(), strict=True):
        places = [place for place in range(100) if ids[place] in MARKERS]
        pairs = {ids[place + 1]: ids[place + 2] for place in places}
        assert len(pairs) == 8 and all(key in KEYS and value in VALUES for key, value in pairs.items())
        assert all(ids[place] >= MARKERS[2] for place in places)
        noise = [ids[place] for place in range(100) if not any(p <= place < p + 3 for p in places)]
        assert len(noise) == 76 and all(token in NOISE[32:] for token in noise)
        asked = [ids[100 + 3 * i : 103 + 3 * i] for i in range(5)]
        assert all(ask == ASK and pairs[key] == value for ask, key, value in asked)
        assert len({key for _, key, _ in asked}) == 5
        assert [i for i, label in enumerate(labels) if label != IGNORED] == list(range(102, 115, 3))
    with pytest.raises(ValueError, match="9 questions about 8 needles"):
        needle_rows(1, 100, torch.Generator(), questions=9)
    source = Needles(64)
    assert torch.equal(source.rows(torch.tensor([5, 9])).input_ids, source.rows(torch.tensor([5, 9])).input_ids)
    assert not torch.equal(source.rows(torch.tensor([5])).input_ids, source.rows(torch.tensor([6])).input_ids)
    lengths = {Needles(64, shortest=60).rows(torch.tensor([number])).context for number in range(60)}
    assert lengths == {60, 61, 62, 63, 64}


def test_decoys_look_like_needles_and_are_never_asked_for() -> None:
    rows = needle_rows(16, 120, torch.Generator().manual_seed(0), needles=6, questions=6, decoys=20, style="shifted")
    before: list[int] = []
    for ids, labels in zip(rows.input_ids.tolist(), rows.labels.tolist(), strict=True):
        places = [place for place in range(120) if ids[place] in MARKERS]
        assert len(places) == 26 and all(ids[p + 1] in KEYS and ids[p + 2] in VALUES for p in places)
        needles = [place for place in places if ids[place + 1] in ASKED_KEYS]
        pairs = {ids[place + 1]: ids[place + 2] for place in needles}
        asked = [ids[120 + 3 * i : 123 + 3 * i] for i in range(6)]
        assert len(pairs) == 6 and {key: value for _, key, value in asked} == pairs
        assert labels[122::3] == [value for _, _, value in asked]
        before.append(places.index(needles[0]))
    assert len(set(before)) > 3  # needles lie anywhere among the decoys
    with pytest.raises(ValueError, match="give 1 to 16 needles"):
        needle_rows(1, 200, torch.Generator(), needles=20, decoys=1)
    with pytest.raises(ValueError, match="8 needles in 60 tokens, and 13 decoys"):
        Needles(64, shortest=60, decoys=13, fewest=0)  # at once, not when a batch draws them
    drawn = [Needles(64, 4, 4, decoys=3, fewest=0).rows(torch.tensor([n])).input_ids[0] for n in range(60)]
    assert {sum(token in MARKERS for token in ids.tolist()) - 4 for ids in drawn} == {0, 1, 2, 3}


def test_contexts_may_end_with_their_questions() -> None:
    settings = {"needles": 5, "questions": 2}
    plain, known = (
        needle_rows(4, 60, torch.Generator().manual_seed(0), known=known, **settings) for known in (False, True)
    )
    assert known.context == 64 and torch.equal(known.input_ids[:, :60], plain.input_ids[:, :60])
    assert torch.equal(known.input_ids[:, 64:], plain.input_ids[:, 60:])
    assert torch.equal(known.input_ids[:, 60:64], plain.input_ids[:, [60, 61, 63, 64]])
    assert torch.equal(known.labels[:, 64:], plain.labels[:, 60:]) and bool((known.labels[:, :64] == IGNORED).all())


def test_copies_come_at_every_distance() -> None:
    ids, labels = copy_rows(400, 40, torch.Generator().manual_seed(0))
    distances = set()
    for row, wanted in zip(ids.tolist(), labels.tolist(), strict=True):
        places = [place for place, label in enumerate(wanted) if label != IGNORED]
        assert len(places) == 9 and row[places[0] : places[-1] + 1] == wanted[places[0] : places[-1] + 1]
        segment = row[places[0] - 1 : places[-1] + 1]
        distances |= {places[0] - 1 - i for i in range(places[0] - 10) if row[i : i + 10] == segment}
    assert len(distances) > 15 and min(distances) == 10


def test_windows_and_answered_prompts() -> None:
    stream = TokenStream.of([TokenDocument(list(range(50)), [True] * 50)])
    rows = TextWindows(stream, 12, 4).rows(torch.tensor([0, 2]))
    assert rows.input_ids[1].tolist() == list(range(32, 48)) and rows.context == 12
    assert rows.labels[1].tolist() == [IGNORED] * 12 + [44, 45, 46, 47]
    with pytest.raises(ValueError, match="give more text, or a shorter context"):
        TextWindows(stream, 60, 4)
    pairs = AnsweredPrompts([([1, 2, 3, 4], [5, 6])], 3).rows(torch.tensor([0]))
    assert pairs.input_ids.tolist() == [[2, 3, 4, 5, 6]] and pairs.context == 3
    with pytest.raises(ValueError, match=r"set data\.batch_size to 1"):
        AnsweredPrompts([([1], [2])] * 2, 3).rows(torch.tensor([0, 1]))


# On the embedded model.


@pytest.mark.slow
def test_trained_heads_keep_what_will_be_asked_for(tmp_path: Path) -> None:
    task = build_task(compose_recipe("locret_needle", {"trainer.max_steps": "400", "logger": "none"}))
    model, tokenizer = load_model("embedded:needle")
    rows = held_out_rows("needle", tokenizer, 512, 32, 16)
    full = quality_of(model, baseline_case(model), rows).accuracy
    untrained = accuracy(model, LocretSelector(task.learned), rows)
    train(task, RunFolder(tmp_path))
    trained = accuracy(model, LocretSelector(task.learned), rows)
    assert full > 0.95 and trained >= full - 0.05
    assert trained >= accuracy(model, Random(), rows) + 0.5 and trained >= untrained + 0.3
    decoys = held_out_rows("needle", tokenizer, 512, 32, 16, decoys=56)
    known, unknown = (
        accuracy(model, selector, decoys, 32, 64)
        for selector in (LocretSelector(task.learned), ExpectedAttention(model))
    )
    assert known >= unknown + 0.1


def accuracy(model: Any, selector: Any, rows: Any, budget: int = 64, chunk: int | None = None) -> float:
    """Where so many units are kept of contexts that are read at once, or so many tokens at a time."""

    @contextmanager
    def enter(context: int) -> Iterator[Any]:
        with attach_cache(model, selector=selector, policy=CachePolicy(budget=budget, stabilizers=2)) as handle:
            yield HandleReader(handle)

    return quality_of(model, CacheCase(name="", kind="adapter", enter=enter), rows, chunk).accuracy
