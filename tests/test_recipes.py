"""Recipes: every shipped one is valid, and a wrong line is told in full, with all others, before anything is made."""

from __future__ import annotations

import pytest

from trainers import recipes
from trainers.config import ConvertConfig, EvaluateConfig, ExportConfig
from trainers.settings import ConfigError, help_text, keys, nearest


def problems(recipe: str, **overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        recipes.compose_recipe(recipe, {key.replace("__", "."): value for key, value in overrides.items()})
    return caught.value.problems


@pytest.mark.parametrize("name", recipes.available())
def test_every_shipped_recipe_is_valid_and_says_how_it_is_run(name: str) -> None:
    recipe = recipes.compose_recipe(name)
    assert recipe.recipe == name and recipe.method in recipes.methods()
    assert f"python -m trainers.fit recipe={name}" in recipes.available()[name]


@pytest.mark.parametrize("name", recipes.available())
def test_a_stored_recipe_composes_to_itself(name: str, tmp_path) -> None:
    recipe = recipes.compose_recipe(name, {"seed": "7", "run": "12"})
    (tmp_path / "config.yaml").write_text(recipes.to_yaml(recipe))
    assert recipes.compose_recipe(str(tmp_path / "config.yaml")) == recipe
    assert recipes.compose_resumed(str(tmp_path), None, {}) == recipe.model_copy(update={"resume": str(tmp_path)})


def test_a_recipe_extends_shipped_ones_from_any_folder(tmp_path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("defaults: [ilf_dit, _self_]\nseed: 5\ntrainer: {max_steps: 3}\n")
    recipe, shipped = recipes.compose_recipe(str(mine)), recipes.compose_recipe("ilf_dit")
    assert (recipe.seed, recipe.trainer.max_steps, recipe.recipe) == (5, 3, "mine")
    assert recipe.backbone == shipped.backbone and recipe.trainer.ema == shipped.trainer.ema


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("trainer.max_stepz", "3", "unknown key trainer.max_stepz: the nearest key is trainer.max_steps"),
        ("max_steps", "3", "unknown key max_steps: the nearest key is trainer.max_steps"),
        ("trainer.max_steps", "many", "trainer.max_steps is 'many', expected an integer > 0"),
        ("trainer.max_steps", "true", "trainer.max_steps is true, expected an integer > 0"),
        ("trainer.devices", "two", "trainer.devices is 'two', expected an integer > 0 or auto"),
        ("optimizer.schedule", "cosin", "optimizer.schedule is 'cosin', expected one of cosine, linear, constant"),
        ("evaluate", "maybe", "evaluate is 'maybe', expected true or false"),
        ("optimizer.betas", "[0.9]", "optimizer.betas is [0.9], expected a list of 2 numbers"),
        ("seed", "[1", "seed=[1 cannot be read: put quotes inside, as 'seed=\"[1\"', or close brackets"),
    ],
)
def test_a_wrong_line_names_key_value_and_what_was_expected(key: str, value: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        recipes.compose_recipe("ilf_pixart", {key: value})
    assert caught.value.problems == [sentence]


def test_all_problems_are_told_at_once() -> None:
    told = problems("ilf_pixart", trainer__max_stepz="3", evaluate="maybe", seed="[1", module__span_len="0")
    assert [line.split()[0] for line in sorted(told)] == ["evaluate", "module.span_len", "seed=[1", "unknown"]


def test_an_unknown_recipe_names_the_nearest_and_how_to_list_them() -> None:
    (sentence,) = problems("ilf_pixrt")
    assert "did you mean recipe=ilf_pixart?" in sentence and "--list" in sentence


def test_an_unknown_method_names_the_files_it_needs() -> None:
    (sentence,) = problems("ilf_pixart", method="medua")
    assert "not one of forecast" in sentence and "trainers/schemas/medua.py" in sentence


def test_sections_are_checked_for_agreement() -> None:
    (sentence,) = problems("ilf_pixart", module__timesteps="[900,500]", module__steps="3")
    assert sentence == "module: timesteps lists 2 steps but steps is 3"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"module.draft_vocab_size": "null"}, "vocabulary pruned needs draft_vocab_size"),
        ({"module.rank": "8"}, "rank is for vocabulary low_rank, not for pruned"),
        ({"lora.rank": "4", "trainer.ema": "0.9"}, "trainer.ema averages the heads alone"),
        ({"lora.rank": "4", "lora.heads_first": "999"}, "LoRA would not train"),
        ({"data.path": "x.jsonl"}, "run python -m trainers.distill"),
        ({"data.recorded": "states", "trainer.devices": "2"}, "set trainer.devices to 1"),
    ],
)
def test_a_medusa_recipe_whose_parts_disagree_is_refused(overrides: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        recipes.compose_recipe("medusa_llama", overrides)
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize(
    ("recipe", "overrides", "words"),
    [
        ("locret_llama3_8b", {"data.batch_size": "2"}, "kind pairs has prompts of different lengths"),
        ("locret_needle", {"data.questions": "9"}, "9 questions ask for different ones of 8 needles"),
        ("locret_needle", {"data.shortest": "999"}, "shortest is for kind needle, and at most length"),
        ("locret_llama", {"data.shortest": "9"}, "shortest is for kind needle"),
        ("locret_llama", {"module.stabilizers": "96"}, "of a budget of 96: give fewer than that"),
        ("locret_llama", {"module.query_aware": "true", "module.local": "0"}, "say how many a question has"),
        ("matryoshka_kv_llama", {"module.budgets": "[0.5,1.5]"}, "a list of numbers between 0 and 1"),
        ("matryoshka_kv_llama", {"lora.rank": "4", "trainer.ema": "0.9"}, "trainer.ema averages the projections alone"),
        ("matryoshka_kv_llama", {"lora.rank": "4", "lora.alone": "999"}, "the projections would not train"),
    ],
)
def test_a_cache_recipe_whose_parts_disagree_is_refused(recipe: str, overrides: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        recipes.compose_recipe(recipe, overrides)
    assert len(caught.value.problems) == 1


def test_names_that_look_like_numbers_stay_names() -> None:
    assert recipes.compose_recipe("ilf_pixart", {"run": "12"}).run == "12"
    assert recipes.compose_recipe("ilf_pixart", {"run": "007"}).run == "007"


def test_a_resumed_run_takes_its_stored_recipe_and_refuses_to_contradict_it(tmp_path) -> None:
    (tmp_path / "config.yaml").write_text(recipes.to_yaml(recipes.compose_recipe("ilf_dit", {"seed": "3"})))
    resumed = recipes.compose_resumed(str(tmp_path), "ilf_dit", {"trainer.max_steps": "900", "seed": "3"})
    assert resumed.trainer.max_steps == 900 and resumed.seed == 3
    with pytest.raises(ConfigError) as caught:
        recipes.compose_resumed(str(tmp_path), "ilf_pixart", {"seed": "4", "optimizer.lr": "1"})
    assert len(caught.value.problems) == 3
    assert "seed is 3 in the resumed run and cannot become 4" in caught.value.problems[2]


def test_every_key_has_a_description_and_appears_in_the_help() -> None:
    for schema in (*map(recipes.schema_of, recipes.methods()), EvaluateConfig, ExportConfig, ConvertConfig):
        text = help_text(schema)
        for key, field in keys(schema):
            assert field.description, key
            assert f"  {key} " in text


def test_nearest_prefers_the_full_name_and_then_the_last_part() -> None:
    every = ["trainer.max_steps", "module.steps", "seed"]
    assert nearest("module.step", every) == "module.steps"
    assert nearest("sed", every) == "seed"
    assert nearest("zzzz", every) is None


def test_command_line_options_and_overrides_may_stand_in_any_order() -> None:
    line = recipes.read_command_line(["a.b=1", "--print", "recipe=x", "-h"], ["--print", "--help"])
    assert line.options == {"--print", "--help"} and line.overrides == {"a.b": "1", "recipe": "x"}
    assert recipes.read_command_line(["--prnt", "word"], ["--print"]).problems == [
        "unknown option --prnt: the nearest is --print",
        "'word' is neither an option nor key=value",
    ]
