"""The backbone behind its cache: one call per tree of guesses, one commit per accepted path."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from modules.decode_host.attention import grouped_attention
from modules.decode_host.cache import keep_rows, prepare_cache, set_columns
from modules.decode_host.masks import TreeMasks, windows_of
from modules.decode_host.tree import TreeTables
from modules.hidden_states import side_by_side, tapped


def stepping() -> AbstractContextManager[None]:
    """The mode of the steps behind a prompt: hundreds of small operations, each quicker without autograd's books.

    What is made within cannot be written to afterwards, so the cache is made before.  With several processes autograd
    stays: what sharded weights are gathered into may be trained on afterwards.
    """
    shared = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.no_grad() if shared else torch.inference_mode()


class Backbone:
    """A causal language model of transformers that is decoded by trees.

    Shapes: B sequences, M nodes of a tree with its root, D hidden size, V vocabulary.

    Attributes:
        lengths: committed length of each sequence in columns of the cache, left padding included.
        columns: where the next tree's rows come.
        hidden: what entered the output matrix in the last call, [B, M, D], with the outputs of n `layers` beside it
            [B, M, (1 + n) D]; None where it is not kept.
    """

    def __init__(self, model: Any, keep_hidden: bool, layers: Sequence[int] = ()) -> None:
        self.model, self.keep_hidden, self.layers = model, keep_hidden, tuple(layers)
        self.windows = windows_of(model.config)
        self._borders = rope_borders(model.config)
        self.cache: Any = None
        self.lengths: list[int] = []
        self.columns = 0
        self.hidden: Tensor | None = None
        self._masks: TreeMasks
        self._room: int | None = None
        self._widths: dict[bool, int | None] = {}
        self._last = self._shift = 0
        self._extra: dict[str, Any] = {}
        self._outputs: Mapping[int, Tensor] = {}
        self._taps = ExitStack()
        self._compiled: Callable[..., Any] | None = None
        self._asked: dict[str, Any] = {}
        self._rows = 2

    @property
    def room(self) -> int | None:
        """Nodes that the cache still has columns for, None for any number."""
        return None if self._room is None else self._room - self.columns

    def depth(self, most: int) -> int:
        """How deep the next tree may be, `most` or less: no guess must change the rotation of the others."""
        length = self.columns + self._shift + 1  # tokens up to the root
        for border, once in self._borders:
            most = min(most, border - length if length <= border else most if once else 0)
        return most

    @contextmanager
    def decoding(self) -> Iterator[None]:
        """Keeps what enters the output matrix, where a drafter reads it, and attends as suits trees."""
        matrix = self.model.get_output_embeddings() if self.keep_hidden else None
        if self.keep_hidden and matrix is None:
            raise ValueError(f"{type(self.model).__name__} has no output matrix, whose input the drafter reads")
        with grouped_attention(self.model), self._taps:
            self._outputs = self._taps.enter_context(tapped(self.model, self.layers))
            if matrix is not None:
                self._taps.callback(matrix.register_forward_pre_hook(self._keep).remove)
            yield

    def _keep(self, module: Any, args: tuple[Tensor, ...]) -> None:
        self.hidden = side_by_side(args[0], self._outputs, self.layers)

    def prefill(self, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any]) -> Tensor:
        """Runs the prompt as transformers would; returns the last row's logits [B, 1, V].

        Raises:
            ValueError: a cache, mask or position ids that trees cannot work with.
        """
        model, mask = self.model, model_kwargs.get("attention_mask")
        if model_kwargs.get("inputs_embeds") is not None:
            raise ValueError("the prompt is given as inputs_embeds, which drafters cannot read: give input_ids")
        # A conversation may go on with its new ids alone; the mask, or its length where it was all ones, has them all.
        seen = getattr(generation_config, "_mask_length", input_ids.shape[1]) if mask is None else mask.shape[1]
        self._last = generation_config.max_length - 1 + seen - input_ids.shape[1]
        self._room = prepare_cache(model_kwargs.get("past_key_values"), self._last)
        positions = model_kwargs.get("position_ids")
        if positions is None or positions.dim() != 2:
            raise ValueError(f"{type(model).__name__} takes no position per token, by which a tree tells its nodes")
        if model._valid_auto_compile_criteria(model_kwargs, generation_config):
            self._compiled = model.get_compiled_call(generation_config.compile_config)
            # A compiled step has no hooks of ours, and gives the same states out.  Those of transformers come with the
            # first call that asks for them, which must not be the one that is compiled.
            self._asked = {"output_hidden_states": [*self.layers, -1]} if self.keep_hidden else {}
        outputs = model._prefill(input_ids, generation_config, {**model_kwargs, **self._asked})
        self.cache = outputs.past_key_values
        length = int(self.cache.get_seq_length())
        self.lengths, self.columns = [length] * len(input_ids), length
        padding = None if mask is None or bool(mask.all()) else mask[:, :length].bool()
        self._masks = TreeMasks(self.windows, padding, _dtype(model))
        # Column `length` of each sequence has the position after its last; plain decoding counts on from there.
        self._offset = (positions[:, -1:] + 1 - length).expand(len(input_ids), 1).to(model.device)
        self._shift = int(self._offset.max()) if self._borders else 0
        self._widths = {bool(layer.is_sliding): getattr(layer, "max_cache_len", None) for layer in self.cache.layers}
        self._extra = {
            name: value
            for name, value in model_kwargs.items()
            if name not in ("attention_mask", "position_ids", "past_key_values", "logits_to_keep", "inputs_embeds")
        }
        if self.hidden is not None:
            self.hidden = self.hidden[:, -1:]
        logits: Tensor = outputs.logits
        return logits[:, -1:]

    def __call__(self, tokens: Tensor, tables: TreeTables) -> Tensor:
        """Logits [B, M, V] of every node; its rows stay in the cache until `commit`.

        Args:
            tokens: [B, M], the root's first.
        """
        lengths, columns = self.lengths, self.columns
        if all(length == columns for length in lengths):
            column = tables.depth + columns
        else:
            column = tables.depth + torch.tensor(lengths, device=tokens.device)[:, None]
            # What a sequence at its limit guesses is of no use, but a learned position must exist.
            column = column.clamp_(max=self._last)
        run = self.model
        if self._compiled is not None and tokens.shape[1] >= self._rows:
            # Trees are cut at the end of a text, and each size would be compiled anew: only the largest is.
            run, self._rows = self._compiled, tokens.shape[1]
            self._taps.close()
        outputs = run(
            input_ids=tokens,
            attention_mask=self._masks.build(tables, lengths, columns, self._widths),
            position_ids=column + self._offset,
            past_key_values=self.cache,
            return_dict=True,
            **self._asked,
            **self._extra,
        )
        if self._asked:
            states = outputs.hidden_states
            self.hidden = side_by_side(states[-1], {layer: states[layer] for layer in self.layers}, self.layers)
        logits: Tensor = outputs.logits
        return logits

    def commit(self, paths: Sequence[Sequence[int]], active: Sequence[bool]) -> None:
        """Keeps the rows of each sequence's path, the root first, and drops the others.

        Args:
            active: which sequences still grow.
        """
        keep_rows(self.cache, self.columns, self.lengths, paths)
        self.lengths = [length + len(path) for length, path in zip(self.lengths, paths, strict=True)]
        growing = [length for length, grows in zip(self.lengths, active, strict=True) if grows]
        # A static cache has no columns past the longest sequence's, so those who lag write over those who have ended.
        self.columns = max(growing if growing and self._room is not None else self.lengths)
        set_columns(self.cache, self.columns)

    def rewind(self, tokens: int) -> None:
        """Forgets the last committed tokens of every sequence."""
        self.lengths = [length - tokens for length in self.lengths]
        self.columns -= tokens
        set_columns(self.cache, self.columns)

    def finish(self) -> Any:
        """The cache, for who wants it back; a static one of several sequences is empty, see `commit`."""
        if self._room is not None and len(self.lengths) > 1:
            self.cache.reset()
        return self.cache


def rope_borders(config: Any) -> list[tuple[int, bool]]:
    """Text lengths at which a rotary embedding changes: once there (true), or with every token from there on."""
    config = config.get_text_config(decoder=True)
    ropes = getattr(config, "rope_parameters", None) or {}
    borders = []
    for rope in [ropes] if "rope_type" in ropes else [rope for rope in ropes.values() if isinstance(rope, dict)]:
        if "dynamic" in rope["rope_type"]:
            borders.append((int(config.max_position_embeddings), False))
        elif rope["rope_type"] == "longrope":
            borders.append((int(rope["original_max_position_embeddings"]), True))
    return borders


def _dtype(model: Any) -> torch.dtype:
    device = model.device.type
    dtype: torch.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else model.dtype
    return dtype
