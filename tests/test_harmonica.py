"""HarmoniCa's router: the numbered properties of a correct implementation, and its adapter."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from checkpoints.load import load_adapter
from modules.diffusion_host import StepClock, WorkCounter
from modules.harmonica import HarmoniCaConfig, RouterTable, attach_masks, operating_points, reuse_ratio
from modules.linear_forecast import taylor_weights
from modules.pipelines import driver, load_pipeline
from modules.reuse import Taylor
from modules.sites import block_stack
from tests.contract_cases.harmonica import RECIPE, hard_final
from tests.tiny import call_kwargs, tiny_pipeline
from tests.tiny_forecast import save_tiny, tiny_recipe
from tests.tiny_ilf import GUIDANCE, INPUTS, SEEDS, driver_of, hooked, latents_of_call, timesteps_of
from trainers.base import state_hash
from trainers.harmonica.lambdas import analytic_lambdas, paper_lambdas, telescoping_lambdas
from trainers.harmonica.student import SoftCache
from trainers.harmonica.task import HarmoniCaTask
from trainers.noise_form import NoisePredictor
from trainers.run_folder import RunFolder
from trainers.training import build_task, train

STEPS = 5
OPS = ("hold", "taylor1", "taylor2", "linear")


@pytest.fixture(params=["pixart", "dit"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("backbones")


@pytest.fixture
def name(kind: str, saved: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    return save_tiny(kind, saved, monkeypatch)


def task_of(name: str, **changes: str) -> HarmoniCaTask:
    return build_task(tiny_recipe(name, RECIPE, **changes))


def trained(name: str, folder: Path, **changes: str) -> HarmoniCaTask:
    task = task_of(name, **changes)
    folder.mkdir(parents=True)
    train(task, RunFolder(folder))
    return task


def config_of(pipe: Any, granularity: str = "submodule", **changes: Any) -> HarmoniCaConfig:
    stack = block_stack(pipe.transformer)
    parts = [[f"{n}.{part}" for part in stack.submodules(i)] for i, n in enumerate(stack.names)]
    units = {"submodule": sum(parts, []), "block": list(stack.names), "model": [type(pipe.transformer).__name__]}
    values = {
        "units": units[granularity], "routed": list(range(1, STEPS)), "timesteps": timesteps_of(pipe, STEPS),
        "guidance": GUIDANCE, "granularity": granularity,
    }  # fmt: skip
    return HarmoniCaConfig(**{**values, **changes})


def random_mask(units: int, seed: int = 0) -> Tensor:
    mask = torch.rand(STEPS, units, generator=torch.Generator().manual_seed(seed)) < 0.5
    mask[0] = True
    return mask


# Property 1.
def test_all_ones_is_uncached_bit_for_bit(kind: str) -> None:
    pipe = tiny_pipeline(kind)
    running, config = driver_of(pipe, kind), config_of(pipe)
    plain = latents_of_call(running, INPUTS[kind], SEEDS, num_inference_steps=STEPS)
    with attach_masks(pipe, config, torch.ones(1, STEPS, len(config.units), dtype=torch.bool), None) as handle:
        assert torch.equal(latents_of_call(running, INPUTS[kind], SEEDS, **handle.call_kwargs), plain)
    assert hooked(pipe) == []


@pytest.mark.parametrize("op", OPS)
def test_all_ones_is_uncached_in_the_student_too(name: str, op: str) -> None:
    task = task_of(name, module__reuse_op=op)
    ones = torch.ones(4, len(task.config.units), dtype=torch.bool)
    inputs = INPUTS["dit" if "dit" in name else "pixart"]
    noise = task.running.initial_noise(SEEDS)
    plain = task.sampler.final(noise, task.running.encode(inputs), lambda step: None)
    assert torch.equal(hard_final(task, noise, inputs, ones), plain)


# Property 2.
@pytest.mark.parametrize("op", ["hold", "taylor2"])
def test_calls_are_the_true_entries_of_the_mask(kind: str, op: str) -> None:
    pipe = tiny_pipeline(kind)
    running, config = driver_of(pipe, kind), config_of(pipe, reuse_op=op)
    mask = random_mask(len(config.units))
    with attach_masks(pipe, config, mask[None], None) as handle, WorkCounter(pipe) as counter:
        running.generate(INPUTS[kind], SEEDS, **handle.call_kwargs)
    assert counter.submodules == int(mask.sum())
    assert reuse_ratio(mask) == pytest.approx(1 - counter.submodules / mask.numel())


def test_a_reused_attention_projects_no_keys_or_values(kind: str) -> None:
    pipe = tiny_pipeline(kind)
    running, config = driver_of(pipe, kind), config_of(pipe)
    calls, attention = [], block_stack(pipe.transformer).blocks[2].attn1
    hooks = [part.register_forward_hook(lambda *_: calls.append(1)) for part in (attention.to_k, attention.to_v)]
    mask = torch.ones(1, STEPS, len(config.units), dtype=torch.bool)
    mask[:, 1:, config.units.index("transformer_blocks.2.attn1")] = False
    with attach_masks(pipe, config, mask, None) as handle:
        running.generate(INPUTS[kind], SEEDS, **handle.call_kwargs)
    assert len(calls) == 2
    for hook in hooks:
        hook.remove()


# Property 3.
@torch.no_grad()
def test_a_reused_row_is_residual_plus_gate_times_the_kept_outputs(kind: str) -> None:
    """Row 2 all false: sub-modules are replaced by constants in a plain model, and everything around them runs."""
    pipe = tiny_pipeline(kind)
    running, config = driver_of(pipe, kind), config_of(pipe)
    mask = torch.ones(1, STEPS, len(config.units), dtype=torch.bool)
    mask[0, 2] = False
    with attach_masks(pipe, config, mask, None) as handle:
        got = latents_of_call(running, INPUTS[kind], SEEDS, **handle.call_kwargs)
    step, kept = [-1], dict[str, Tensor]()

    def replaced(unit: str, part: Any) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if step[0] != 2:
                kept[unit] = type(part).forward(part, *args, **kwargs)
            return kept[unit]

        return forward

    pipe.transformer.register_forward_pre_hook(lambda *_: step.__setitem__(0, step[0] + 1))
    for unit in config.units:
        part = pipe.transformer.get_submodule(unit)
        part.forward = replaced(unit, part)
    assert torch.equal(got, latents_of_call(running, INPUTS[kind], SEEDS, num_inference_steps=STEPS))


# Property 4.
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("granularity", ["submodule", "block", "model"])
def test_hard_scores_make_student_and_inference_agree(name: str, op: str, granularity: str) -> None:
    task = task_of(name, module__reuse_op=op, module__granularity=granularity, module__steps=str(STEPS))
    inputs, noise = INPUTS["dit" if "dit" in name else "pixart"], task.running.initial_noise(SEEDS)
    mask = random_mask(len(task.config.units), seed=3)
    mask[2] = granularity != "model"
    with torch.no_grad():
        for row in task.learned.router.corrections:
            row.add_(0.05 * torch.randn(row.shape, generator=torch.Generator().manual_seed(1)))
    student = hard_final(task, noise, inputs, mask)
    task.reuse.detach()
    weights = task.learned.router.forecast_weights(mask)[None] if op == "linear" else None
    with attach_masks(task.running.pipe, task.config, mask[None], weights) as handle:
        got = latents_of_call(task.running, inputs, SEEDS, **handle.call_kwargs)
    torch.testing.assert_close(got, student, rtol=1e-4, atol=1e-4)


# Property 5.
@pytest.mark.parametrize("op", ["hold", "linear"])
def test_an_update_moves_its_own_row_and_nothing_else(name: str, op: str, tmp_path: Path) -> None:
    task = task_of(name, module__reuse_op=op, trainer__max_steps="2")
    router, frozen = task.learned.router, state_hash(task.backbone)
    seen: list[list[Tensor]] = []

    def rows() -> list[Tensor]:
        return [
            torch.cat([r.detach().flatten() for r in pair])
            for pair in zip(router.logits, router.corrections or router.logits, strict=True)
        ]

    step = task.optimizer_step
    task.optimizer_step = lambda *a, **k: (seen.append(rows()), step(*a, **k), seen.append(rows()))  # type: ignore
    (tmp_path / "run").mkdir()
    train(task, RunFolder(tmp_path / "run"))
    for update in range(2):
        before, after = seen[2 * update], seen[2 * update + 1]
        moved = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
        assert moved == [row == update for row in range(3)]
    assert state_hash(task.backbone) == frozen and all(p.grad is None for p in task.backbone.parameters())
    assert len(router.logits) == len(task.config.timesteps) - 1  # the first row has no parameter


def test_logits_stay_within_bounds(name: str, tmp_path: Path) -> None:
    task = trained(name, tmp_path / "run", optimizer__lr="9.0")
    logits = torch.stack(list(task.learned.router.logits))
    assert logits.abs().max() == 5.0


# Property 6.
def test_nothing_accumulates(saved: Path) -> None:
    def with_graph() -> int:
        return sum(isinstance(x, Tensor) and x.grad_fn is not None for x in gc.get_objects())

    def alive(steps: int) -> int:
        """The most tensors with a graph between two updates, after two trajectories."""
        task = task_of(save_tiny("dit", saved), module__steps=str(steps), objective__lambda_mode="none")
        optimizer = task.configure_optimizers()["optimizer"]
        most = 0
        for number in range(2 * (steps - 1)):
            task.batch_number = number
            task.training_step(torch.tensor([0, 1]), number).backward()
            optimizer.step()
            optimizer.zero_grad()
            gc.collect()
            most = max(most, with_graph())
            if task._running is not None:
                kept = [x for slot in task._running.soft.predictor._kept.values() for x in slot]
                assert len(kept) == len(task.config.units) and not any(x.requires_grad for x in kept)
        return most

    before = with_graph()
    assert alive(3) == alive(9) == before


# Property 7.
def test_lambdas_are_those_of_the_note() -> None:
    """A sampler that adds up what its rows say: leave-one-out and telescoping by hand."""
    values = {1: 0.5, 2: -1.0}
    table = lambda step: values.get(step)  # noqa: E731

    def final(rows: Any) -> Tensor:
        own = {step: rows(step) for step in (0, 1, 2)}
        first, second = (0.0 if own[step] is None else own[step] for step in (1, 2))
        return torch.tensor([[first + 2 * second + first * second]])

    got = paper_lambdas(final, table, [1, 2])  # type: ignore[arg-type]
    assert got.tolist() == pytest.approx([(-2.0 - -2.0) ** 2, (-2.0 - 0.5) ** 2])
    got = telescoping_lambdas(final, table, [1, 2])  # type: ignore[arg-type]
    assert got.tolist() == pytest.approx([0.25, (0.5 - -2.0) ** 2])


@pytest.mark.parametrize("mode", ["paper", "telescoping"])
def test_nothing_reused_weighs_nothing_and_weights_have_no_gradient(name: str, mode: str) -> None:
    task = task_of(name, objective__lambda_mode=mode)
    task._refresh(0)
    assert (task.learned.lambdas > 0).all() and not task.learned.lambdas.requires_grad
    ones = lambda step: (torch.ones(len(task.config.units)), None) if step else None  # noqa: E731
    task.learned.row = ones  # type: ignore[method-assign]
    task._refresh(0)
    assert task.learned.lambdas.tolist() == [0, 0, 0]


def test_analytic_weights_have_mean_one_and_follow_the_prediction() -> None:
    running = driver_of(tiny_pipeline("dit"), "dit")
    predict = NoisePredictor(running)
    by_noise = analytic_lambdas(predict, [900, 600, 300], [1, 2])
    assert by_noise.mean() == pytest.approx(1)
    predict.prediction_type = "v_prediction"
    by_velocity = analytic_lambdas(predict, [900, 600, 300], [1, 2])
    alphas = [predict.levels(t)[0] for t in (600, 300)]
    assert float(by_velocity[1] / by_velocity[0]) == pytest.approx(
        float(by_noise[1] / by_noise[0]) * (alphas[1] / alphas[0]) ** 2, rel=1e-5
    )


def test_weights_are_refreshed_every_so_many_updates(saved: Path, tmp_path: Path, monkeypatch: Any) -> None:
    asked: list[int] = []
    task = task_of(save_tiny("dit", saved), objective__refresh="3")
    monkeypatch.setattr(
        "trainers.harmonica.task.paper_lambdas", lambda *_: asked.append(task.batch_number) or torch.ones(3)
    )
    (tmp_path / "run").mkdir()
    train(task, RunFolder(tmp_path / "run"))
    assert asked == [0, 3, 6]


# Property 8.
def test_state_is_reset_between_runs_and_batch_sizes(kind: str) -> None:
    pipe = tiny_pipeline(kind)
    running, config = driver_of(pipe, kind), config_of(pipe, reuse_op="taylor1")
    with attach_masks(pipe, config, random_mask(len(config.units))[None], None) as handle:
        first, _, again = (
            latents_of_call(running, INPUTS[kind][:n], SEEDS[:n], **handle.call_kwargs) for n in (2, 3, 2)
        )
    assert torch.equal(first, again)


# Property 12, and budgets.
def test_a_budget_is_met_exactly_by_the_highest_scores(kind: str) -> None:
    config = config_of(tiny_pipeline(kind))
    router = RouterTable(config, torch.Generator().manual_seed(4))
    scores = router.scores()
    assert (scores[0] == 1).all() and torch.equal(router.mask(), scores > 0.1)
    for share in (0.9, 0.5, 0.35, 0.2):
        mask = router.mask_at(share)
        assert mask[0].all() and int(mask.sum()) == max(len(config.units), round(share * mask.numel()))
        if mask[1:].any():
            assert scores[1:][mask[1:]].min() >= scores[1:][~mask[1:]].max()
    assert router.mask_at(0.2).sum() == len(config.units)


def test_beta_rises_while_too_much_is_computed(saved: Path, tmp_path: Path) -> None:
    name = save_tiny("dit", saved)
    task = trained(name, tmp_path / "run", objective__target_compute="0.3", trainer__max_steps="60")
    computed = float(task.learned.router.mask().float().mean())
    assert float(task.learned.beta) > 1e-3 and computed < 0.7
    fixed = trained(name, tmp_path / "fixed", objective__target_compute="null")
    assert float(fixed.learned.beta) == pytest.approx(1e-3)
    assert torch.equal(fixed.masks()[0], fixed.learned.router.mask())


def test_resuming_in_the_middle_of_a_trajectory_equals_never_stopping(saved: Path, tmp_path: Path) -> None:
    name = save_tiny("dit", saved)
    settings = {"optimizer__schedule": "constant", "module__reuse_op": "linear"}
    whole = trained(name, tmp_path / "whole", **settings)
    (tmp_path / "parts").mkdir()
    for stop in ("2", "5", "8"):  # trajectories are three updates long
        part = task_of(name, **settings, trainer__max_steps=stop)
        train(part, RunFolder(tmp_path / "parts"))
    mine, theirs = part.state_dict(), whole.state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


# Learning-to-Cache.
def test_learning_to_cache_routes_every_second_step(name: str, tmp_path: Path) -> None:
    changes = {"objective.kind": "l2c", "objective.lambda_mode": "none"}
    task = trained(name, tmp_path / "run", **changes, module__steps="6", trainer__max_steps="12")
    assert task.config.routed == [1, 3, 5] and torch.stack(list(task.learned.router.logits)).isfinite().all()
    mask = task.masks()[0]
    assert mask[::2].all() and not mask[1::2].all() and int(mask.sum()) == round(0.6 * mask.numel())


# The learned forecast.
def test_corrections_are_added_to_taylor_at_the_steps_computed_before(kind: str) -> None:
    config = config_of(tiny_pipeline(kind), reuse_op="linear")
    router = RouterTable(config)
    mask = torch.ones(STEPS, len(config.units), dtype=torch.bool)
    mask[[2, 4], 1] = False
    with torch.no_grad():
        router.corrections[3][1, 2] = 0.25
    weights = router.forecast_weights(mask)
    assert weights[2, 1].tolist() == taylor_weights(2, [1, 0], 3)
    assert weights[4, 1].tolist() == pytest.approx([2.0, -1.0, 0.25])
    point = operating_points(config, mask[None], weights[None])[0]
    values = torch.randn(2, 3, 4)
    learned, taylor = point.predictor(), Taylor(1)
    for predictor in (learned, taylor):
        for step in (0, 1):
            predictor.observe(1, step, (), (values[step],))
    torch.testing.assert_close(learned.predict(1, 2, ())[0], taylor.predict(1, 2, ())[0])


def test_the_forecast_is_fitted_anew_to_the_steps_of_the_router(saved: Path, tmp_path: Path) -> None:
    name = save_tiny("dit", saved)
    changes = {
        "module.granularity": "model", "module.reuse_op": "linear", "module.steps": "6", "objective.refit": "true",
        "objective.polish": "1", "data.recorded": "8", "data.searched": "6",
    }  # fmt: skip
    task = trained(name, tmp_path / "run", **changes)
    masks, weights = task.points()
    assert masks.sum((1, 2)).tolist() == task.masks().sum((1, 2)).tolist() == [4, 5]
    assert weights.shape == (2, 6, 1, 7) and not weights[masks].any() and weights[~masks].any(1).all()
    task.export_adapter(tmp_path / "adapter")
    running = driver(load_pipeline(name), name)
    with load_adapter(running.pipe, tmp_path / "adapter") as handle, WorkCounter(running.pipe) as counter:
        running.generate([3], [1], **handle.call_kwargs)
    assert counter.blocks == 4 * 4


# The adapter.
def test_a_router_is_small_and_names_what_it_routes(name: str, tmp_path: Path) -> None:
    task = trained(name, tmp_path / "run")
    task.export_adapter(tmp_path / "adapter")
    size = sum(path.stat().st_size for path in (tmp_path / "adapter").iterdir())
    assert size <= 64 * 1024
    pipe = load_pipeline(name)
    other = HarmoniCaConfig(**{**vars(task.config), "units": ["elsewhere", *task.config.units[1:]]})
    with pytest.raises(ValueError, match="routes elsewhere, which the transformer lacks"):
        attach_masks(pipe, other, task.masks(), None)
    assert hooked(pipe) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"objective__target_compute": "0.2"}, "a share of 0.2 must be below 1 and at least 0.25"),
        ({"objective__kind": "l2c"}, "set it to none for l2c"),
        ({"objective__refit": "true"}, "needs module.granularity model"),
        ({"objective__polish": "1"}, "set objective.refit"),
        ({"data__searched": "999"}, "data.searched is 999"),
        ({"trainer__accumulate_grad_batches": "2"}, "an update is one step of a trajectory"),
    ],
)
def test_a_recipe_whose_parts_disagree_is_refused(changes: dict[str, str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        tiny_recipe("dit", RECIPE, **changes)


def test_the_table_adds_no_graph_break(kind: str) -> None:
    """Under torch.compile a step breaks where the clock counts it, and nowhere else, reused units or not."""
    model = tiny_pipeline(kind).transformer
    arguments = {"timestep": torch.full((2,), 500), **call_kwargs(kind, 2)}

    def breaks() -> int:
        torch._dynamo.reset()
        return int(torch._dynamo.explain(model)(torch.ones(2, 4, 8, 8), **arguments).graph_break_count)

    with StepClock(model):
        counting = breaks()
    config = config_of(tiny_pipeline(kind))
    with attach_masks(model, config, random_mask(len(config.units))[None], None), torch.no_grad():
        assert [breaks() for _ in range(STEPS)] == [counting] * STEPS
    torch._dynamo.reset()


def test_soft_scores_blend_and_write_hard() -> None:
    config = HarmoniCaConfig(units=["a", "b"], routed=[1], timesteps=[9, 1], guidance=1.0)
    soft = SoftCache(config)
    old, new = torch.ones(2), torch.full((2,), 3.0, requires_grad=True)
    soft.set_row(None)
    for unit in (0, 1):
        soft.blend(unit, 0, (), (old,))
    scores = torch.tensor([0.25, 0.05], requires_grad=True)
    soft.set_row((scores, None))
    blended = [soft.blend(unit, 1, (), (2 * new,))[0] for unit in (0, 1)]
    assert blended[0].tolist() == pytest.approx([2.25, 2.25]) and blended[1].tolist() == pytest.approx([1.25, 1.25])
    torch.stack(blended).sum().backward()
    assert scores.grad.tolist() == pytest.approx([10.0, 10.0]) and new.grad.tolist() == pytest.approx([0.6, 0.6])
    assert [soft.predictor.predict(unit, 1, ())[0].tolist() for unit in (0, 1)] == [[6.0, 6.0], [1.0, 1.0]]
