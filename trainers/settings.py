"""Turn a pydantic schema into help, and what it refuses into sentences: full key, value, what was expected."""

from __future__ import annotations

import difflib
import json
import textwrap
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

Schema = TypeVar("Schema", bound=BaseModel)
_KINDS = {int: "an integer", float: "a number", bool: "true or false", str: "text", type(None): "null"}
_BOUNDS = (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))


class ConfigError(ValueError):
    """Everything that is wrong with what was asked for, one sentence each, in `problems`."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))


def nearest(name: str, names: Sequence[str]) -> str | None:
    """The candidate most like `name`, or None when nothing is; a dotted name is also compared by its last part."""
    if close := difflib.get_close_matches(name, names, n=1, cutoff=0.6):
        return close[0]
    tails = {candidate.rpartition(".")[2]: candidate for candidate in names}
    close = difflib.get_close_matches(name.rpartition(".")[2], list(tails), n=1, cutoff=0.6)
    return tails[close[0]] if close else None


def _section(annotation: Any) -> type[BaseModel] | None:
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def keys(schema: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """(dotted key, field) of every value a schema holds, sections opened."""
    for name, field in schema.model_fields.items():
        if inner := _section(field.annotation):
            yield from keys(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def expected(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """What a field takes, in words: `an integer > 0`, `one of cosine, constant`, `a list of integers or null`."""
    if section := _section(annotation):
        return f"a section with the keys {', '.join(section.model_fields)}"
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return expected(args[0], [*args[1:], *metadata])
    if origin in (Union, types.UnionType):
        return " or ".join(expected(arg, metadata) for arg in args)
    if origin is Literal:
        return str(args[0]) if len(args) == 1 else f"one of {', '.join(map(str, args))}"
    if origin is list:
        return f"a list of {_plural(args[0])}"
    if origin is tuple:
        return f"a list of {len(args)} {_plural(args[0])}"
    bounds = [f"{sign} {getattr(m, name)}" for m in metadata for name, sign in _BOUNDS if hasattr(m, name)]
    return " ".join([_KINDS.get(annotation, str(annotation)), " and ".join(bounds)]).strip()


def _plural(annotation: Any) -> str:
    if get_origin(annotation) is Annotated:
        return _plural(get_args(annotation)[0])
    if get_origin(annotation) is Literal:
        return " and ".join(map(str, get_args(annotation)))
    return {int: "integers", float: "numbers", str: "texts"}.get(annotation, "values")


def _find(schema: type[BaseModel], location: Sequence[Any]) -> tuple[str, FieldInfo | None]:
    """The dotted key that a pydantic error location means (union branches dropped), and its field."""
    parts: list[str] = []
    field: FieldInfo | None = None
    model: type[BaseModel] | None = schema
    for part in location:
        if model is None or part not in model.model_fields:
            break
        field = model.model_fields[part]
        parts.append(str(part))
        model = _section(field.annotation)
    return ".".join(parts), field


def _value_at(values: Any, key: str) -> Any:
    for part in key.split("."):
        values = values[part]
    return values


def _shown(value: Any) -> str:
    return json.dumps(value, default=str) if not isinstance(value, str) else f"'{value}'"


def _sentence(schema: type[BaseModel], error: Mapping[str, Any], values: Any) -> str:
    location = error["loc"]
    if error["type"] == "extra_forbidden":
        return unknown_key(schema, ".".join(map(str, location)))
    key, field = _find(schema, location)
    if error["type"] in ("value_error", "assertion_error"):
        message = str(error["msg"]).partition(", ")[2]
        in_field = field is not None and _section(field.annotation) is None
        return f"{key} is {_shown(_value_at(values, key))}, expected {message}" if in_field else f"{key}: {message}"
    if field is None:
        return f"{error['msg']}"
    wanted = expected(field.annotation, field.metadata)
    if error["type"] == "missing" and key == ".".join(map(str, location)):
        return f"{key} is missing, expected {wanted}: {field.description}"
    return f"{key} is {_shown(_value_at(values, key))}, expected {wanted}"


def unknown_key(schema: type[BaseModel], key: str) -> str:
    """The sentence for a key that the schema does not have."""
    every = [name for name, _ in keys(schema)]
    close = nearest(key, every)
    return f"unknown key {key}: " + (f"the nearest key is {close}" if close else "--help lists every key")


def validate(schema: type[Schema], values: Mapping[str, Any]) -> Schema:
    """The checked settings.

    Raises:
        ConfigError: with every problem at once, each naming key, value and what was expected.
    """
    try:
        return schema.model_validate_json(json.dumps(values, default=str))
    except ValidationError as error:
        sentences = [_sentence(schema, one, values) for one in error.errors(include_url=False)]
        raise ConfigError(list(dict.fromkeys(sentences))) from None


def help_text(schema: type[BaseModel], chosen: BaseModel | None = None, width: int = 118) -> str:
    """Every key with type, value and meaning; the values are those of `chosen`, else the schema's defaults."""
    values = chosen.model_dump(mode="json") if chosen else None
    lines = []
    for key, field in keys(schema):
        default = field.get_default(call_default_factory=True)
        value = _value_at(values, key) if values is not None else default
        shown = "(required)" if value is PydanticUndefined else f"= {_shown(value)}"
        lines.append(f"  {key} {shown}   [{expected(field.annotation, field.metadata)}]")
        lines += textwrap.wrap(field.description or "", width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)
