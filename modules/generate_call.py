"""A model's own `generate`, for those who stand in for it: what a call asks for, and the way back."""

from __future__ import annotations

import inspect
from typing import Any


class PlainGenerate:
    """The `generate` that a model had before somebody stood in for it."""

    def __init__(self, model: Any) -> None:
        """Raises ValueError where somebody does already."""
        if "generate" in vars(model):
            raise ValueError("the model's generate is replaced already: detach what did it, or join drafters by Hybrid")
        self.model, self.plain = model, model.generate
        self._signature = inspect.signature(self.plain)

    def read(self, args: Any, kwargs: Any) -> tuple[Any, dict[str, Any], Any]:
        """What a call names: nameless arguments of a wrapper, all others by name, and the generation config of both."""
        named = self._signature.bind(*args, **kwargs).arguments
        rest = named.pop("args", ())  # a wrapper's, whose own arguments have no names
        call = {**named, **named.pop("kwargs", {})}
        config, _ = self.model._prepare_generation_config(
            call.get("generation_config"),
            **{name: value for name, value in call.items() if name != "generation_config"},
        )
        return rest, call, config
