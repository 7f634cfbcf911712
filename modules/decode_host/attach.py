"""Making `model.generate(...)` itself use a drafter."""

from __future__ import annotations

from functools import partial
from typing import Any

from transformers.generation import StoppingCriteriaList, StopStringCriteria

from modules.contracts import Drafter, Handle
from modules.decode_host.counts import Counts
from modules.decode_host.generate import MODES, DraftedDecoding
from modules.decode_host.masks import windows_of
from modules.decode_host.rules import Rule
from modules.generate_call import PlainGenerate


class DecodeHandle(Handle):
    """A drafter at work in a model's `generate`.

    Greedy decoding and sampling are drafted.  Whatever asks for another way of decoding (beams, an assistant model,
    a `custom_generate` of its own) goes to transformers untouched.  `type(model).generate(model, ...)` is plain
    decoding meanwhile.

    Attributes:
        drafter: what guesses.
        counts: what was done since attaching; `counts.tokens_per_step`.
    """

    def __init__(self, model: Any, decoding: DraftedDecoding) -> None:
        super().__init__()
        self.drafter = decoding.drafter
        self._own, self._model, self._decoding = PlainGenerate(model), model, decoding
        model.generate = self._generate

    @property
    def counts(self) -> Counts:
        """Work done since attaching, or since `counts.reset()`."""
        return self._decoding.counts

    def memory_bytes(self) -> int:
        """Bytes that the drafter holds."""
        return self.drafter.memory_bytes()

    def detach(self) -> None:
        """Gives the model its own `generate` back."""
        if self._model is not None:
            del self._model.generate
            self._model = None

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        rest, call, config = self._own.read(args, kwargs)
        if (
            call.get("custom_generate") is None
            and config.get_generation_mode(call.get("assistant_model")) in MODES
            and not self._model.config.is_encoder_decoder
        ):
            call = self._prepared(config, call)
        return self._own.plain(*rest, **call)

    def _prepared(self, config: Any, call: dict[str, Any]) -> dict[str, Any]:
        # transformers hands a custom_generate neither the streamer nor the tokenizer that stop strings need.
        call = {**call, "custom_generate": partial(self._decoding, streamer=call.get("streamer"))}
        if config.stop_strings is not None and call.get("tokenizer") is not None:
            stop = StopStringCriteria(call["tokenizer"], config.stop_strings)
            call["stopping_criteria"] = StoppingCriteriaList([*(call.get("stopping_criteria") or []), stop])
            call["stop_strings"] = None
        return call


def attach_drafter(model: Any, drafter: Drafter, sampling: Rule | None = None) -> DecodeHandle:
    """Lets a drafter speed up a model's `generate`.

    Args:
        model: a causal language model of transformers.
        sampling: acceptance when sampling, where it is not to be exact (`Typical()`).
    Raises:
        ValueError: the model's attention takes no tree mask, or its `generate` is replaced already.
    """
    windows_of(model.config)
    return DecodeHandle(model, DraftedDecoding(drafter, sampling))
