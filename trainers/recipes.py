"""Find, compose and check recipes.

Hydra's compose API reads the YAML (recipes extend one another through `defaults`) and applies `key=value`; pydantic
owns the keys, types, defaults and messages.  Nothing here imports torch, makes a folder or changes the working folder.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import BaseModel

from trainers.config import RecipeBase
from trainers.settings import ConfigError, help_text, keys, nearest, validate

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
# Keys and whole sections; the last is how the command names the run.
RESUME_MAY_CHANGE = ("trainer.max_steps", "trainer.profile", "logger", "wandb", "evaluate", "resume")
Schema = TypeVar("Schema", bound=BaseModel)


@dataclass
class CommandLine:
    """What was typed: the options, and `key=value` in order."""

    options: set[str] = field(default_factory=set)
    overrides: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def take(self, key: str) -> str | None:
        """Remove one key and return its value."""
        return self.overrides.pop(key, None)


def read_command_line(argv: Sequence[str], options: Sequence[str]) -> CommandLine:
    """Split argv into options and overrides; what is neither becomes a problem, reported with all others."""
    line = CommandLine()
    for word in argv:
        key, equals, value = word.partition("=")
        if word == "-h":
            line.options.add("--help")
        elif word in options:
            line.options.add(word)
        elif word.startswith("-"):
            close = nearest(word, options)
            line.problems.append(f"unknown option {word}: " + (f"the nearest is {close}" if close else "see --help"))
        elif not equals or not key.replace("_", "").replace(".", "").isalnum():
            line.problems.append(f"'{word}' is neither an option nor key=value")
        else:
            line.overrides[key] = value
    return line


def methods() -> list[str]:
    """Stems of the methods that a recipe can name."""
    return sorted(path.stem for path in (Path(__file__).parent / "schemas").glob("[a-z]*.py"))


def schema_of(method: Any) -> type[RecipeBase]:
    """The `Recipe` class of a method.

    Raises:
        ConfigError: no method has this name.
    """
    if method not in methods():
        raise ConfigError(
            [
                f"method is {method!r}, which is not one of {', '.join(methods())}; "
                f"a new method needs modules/{method}.py, trainers/{method}.py and trainers/schemas/{method}.py"
            ]
        )
    schema: type[RecipeBase] = importlib.import_module(f".schemas.{method}", __package__).Recipe
    return schema


def available() -> dict[str, str]:
    """Every shipped recipe's name, with its comment header."""
    return {path.stem: description(path) for path in sorted(RECIPES.glob("*.yaml"))}


def description(path: Path) -> str:
    """The comment lines that a recipe begins with, without their marks."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").removeprefix(" "))
    return "\n".join(lines)


def find(recipe: str) -> Path:
    """The file of a recipe given by name, or by a path that ends in .yaml.

    Raises:
        ConfigError: there is none; names the nearest.
    """
    path = Path(recipe) if recipe.endswith((".yaml", ".yml")) else RECIPES / f"{recipe}.yaml"
    if path.is_file():
        return path
    close = nearest(recipe, list(available()))
    hint = f"did you mean recipe={close}? " if close else ""
    raise ConfigError([f"there is no recipe '{recipe}': {hint}--list shows all, or give the path of a .yaml file"])


def merge(path: Path | None, overrides: Mapping[str, str]) -> dict[str, Any]:
    """Plain values of a recipe file, of all that it extends, and of `key=value` on top.

    Raises:
        ConfigError: a value Hydra cannot read, a recipe extended that is not there, YAML that does not parse.
    """
    from hydra import compose, initialize_config_dir
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException, MissingConfigException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    # Every key is added by force: whether it exists is for the schema to say, for all keys at once.
    words, problems, parser = [], [], OverridesParser.create()
    for key, value in overrides.items():
        try:
            parser.parse_override(f"++{key}={value}")
            words.append(f"++{key}={value}")
        except HydraException:
            problems.append(
                f"{key}={value} cannot be read: put quotes inside, as '{key}=\"{value}\"', or close brackets"
            )
    folder = path.resolve().parent if path else RECIPES
    try:
        with initialize_config_dir(str(folder), version_base="1.3"):
            search = [f"hydra.searchpath=['file://{RECIPES}']"] if folder != RECIPES else []
            composed = compose(path.stem if path else None, overrides=search + words)
        values = cast(dict[str, Any], OmegaConf.to_container(composed, resolve=True))
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        problems.append(f"{path or 'the command line'}: {' '.join(str(error).split('Config search path')[0].split())}")
        if isinstance(error, MissingConfigException):
            problems[-1] += f" The recipes that can be extended are {', '.join(available())}."
        values = {}
    if problems:
        raise _UnreadableError(problems, values)
    return values


class _UnreadableError(ConfigError):
    """Some overrides could not be read; `values` holds the others, so that their problems are told as well."""

    def __init__(self, problems: Sequence[str], values: dict[str, Any]) -> None:
        super().__init__(problems)
        self.values = values


def compose_recipe(recipe: str, overrides: Mapping[str, str] | None = None) -> RecipeBase:
    """The checked recipe `recipe` (name or path) with `overrides` (dotted key -> text as typed) applied.

    Raises:
        ConfigError: with every problem at once.
    """
    path = find(recipe)
    return _checked(path, overrides or {}, recipe=path.stem)


def _checked(path: Path, overrides: Mapping[str, str], recipe: str = "") -> RecipeBase:
    problems: list[str] = []
    try:
        values = merge(path, overrides)
    except _UnreadableError as error:
        problems, values = error.problems, error.values
        if not values:
            raise ConfigError(problems) from None
    try:
        checked = validate(schema_of(values.get("method")), {"recipe": recipe} | values)
    except ConfigError as error:
        raise ConfigError(problems + error.problems) from None
    if problems:
        raise ConfigError(problems)
    return checked


def stored_recipe(folder: str, key: str) -> RecipeBase:
    """The recipe that a run's folder holds; `key` is how the command calls the folder.

    Raises:
        ConfigError: there is none, or this code does not know it any more.
    """
    path = Path(folder) / "config.yaml"
    if not path.is_file():
        raise ConfigError([f"{key}={folder} holds no config.yaml: give a run's folder, as outputs/<recipe>/<run>"])
    return _checked(path, {})


def compose_resumed(folder: str, recipe: str | None, overrides: Mapping[str, str]) -> RecipeBase:
    """The recipe stored in a run's folder, with the few changes that a resumed run allows.

    Raises:
        ConfigError: no stored recipe there, or an override that contradicts it.
    """
    before = stored_recipe(folder, "resume")
    after = _checked(Path(folder) / "config.yaml", overrides)
    problems = []
    if recipe and Path(recipe).stem != before.recipe:
        problems.append(f"resume={folder} is a run of recipe {before.recipe}, not of {recipe}: leave recipe= out")
    old, new = before.model_dump(mode="json"), after.model_dump(mode="json")
    for key, _ in keys(type(after)):
        was, now = _at(old, key), _at(new, key)
        if was != now and not {key, key.partition(".")[0]} & {*RESUME_MAY_CHANGE}:
            problems.append(
                f"{key} is {was!r} in the resumed run and cannot become {now!r}: "
                f"only {', '.join(RESUME_MAY_CHANGE[:-1])} may change; start a new run instead"
            )
    if problems:
        raise ConfigError(problems)
    return after.model_copy(update={"resume": folder})


def _at(values: Any, key: str) -> Any:
    for part in key.split("."):
        values = values[part]
    return values


def to_yaml(config: BaseModel) -> str:
    """The resolved settings as YAML, readable by `recipe=FILE.yaml`."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(config.model_dump(mode="json")))


def plain_command(schema: type[Schema], argv: Sequence[str], usage: str) -> Schema | None:
    """Settings of a command that takes no recipe, from `key=value`; None when --help or --print was answered.

    Raises:
        ConfigError: with every problem at once.
    """
    line = read_command_line(argv, ["--help", "--print"])
    if "--help" in line.options:
        print(f"{usage}\n\n{help_text(schema)}")
        return None
    problems, values = line.problems, {}
    try:
        values = merge(None, line.overrides)
    except _UnreadableError as error:
        problems, values = problems + error.problems, error.values
    try:
        config = validate(schema, values)
    except ConfigError as error:
        raise ConfigError(problems + error.problems) from None
    if problems:
        raise ConfigError(problems)
    if "--print" in line.options:
        print(to_yaml(config), end="")
        return None
    return config


def refused(error: ConfigError) -> int:
    """Print one line per problem on stderr; returns the exit code of a refused configuration."""
    for problem in error.problems:
        print(f"error: {problem}", file=sys.stderr)
    return 2


def exit_on_error(main: Callable[[], int]) -> int:
    """Run a command; what it refuses is told as `refused` does."""
    try:
        return main()
    except ConfigError as error:
        return refused(error)
    except BrokenPipeError:  # whoever reads it has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
