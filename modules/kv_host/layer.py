"""One layer of the cache: takes new tokens in, attends over what it holds, lets go of what its selector gives up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from modules.kv_host.interface import CacheView
from modules.kv_host.roles import rotate
from modules.kv_host.units import NOT_TEXT, HeadGroup, Units, attend, restored

if TYPE_CHECKING:
    from modules.kv_host.cache import Setting


@dataclass(frozen=True)
class NewTokens:
    """What a layer knows of the tokens that have just entered.

    Shapes: B sequences, T tokens, H KV heads of g query heads each, d head size.

    layer: its number.
    queries: [B, H g, T, d], rotated.  keys, values: [B, H, T, d], keys rotated; at full width whatever the codec.
    features: [B, T, (H g + 2 H) d], queries, keys and values side by side and from before their rotation; None where
        the selector does not need them.
    valid: bool [B, T], None where all are text.
    positions: int64 [B, T], places in the text.
    memory: what a selector keeps from chunk to chunk; emptied with the cache.
    """

    layer: int
    queries: Tensor
    keys: Tensor
    values: Tensor
    features: Tensor | None
    valid: Tensor | None
    positions: Tensor
    memory: dict[str, Any]


@dataclass(frozen=True)
class HeldUnits:
    """What a layer holds, the new tokens last.

    keys, values: [B, H, N, d], as far as the codec left them; keys rotated.
    positions: [B, H, N], NOT_TEXT for filling; None where nobody asked for them.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor | None


@dataclass
class _Waiting:
    """New keys and values, between the call that brings them and the one that brings their queries."""

    keys: Tensor
    values: Tensor


class KVLayer(CacheLayerMixin, CacheView):  # type: ignore[misc]
    """The cache of one attention layer.

    What transformers calls the length is the text's (`seen`), so that positions go on and nothing is read twice; what
    is held may be less.

    Attributes:
        seen: tokens of the text, filling included.
        peak: most units per head that were held at a time.
    """

    is_sliding = False

    def __init__(self, index: int, setting: Setting) -> None:
        super().__init__()
        self.index, self.setting = index, setting
        self.units: Units | None = None
        self.seen, self.peak, self.generated = 0, 0, 0
        self.memory: dict[str, Any] = {}
        self._waiting: _Waiting | None = None

    def __len__(self) -> int:
        return 0 if self.units is None else len(self.units)

    # What transformers calls.

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is to be made before there is something to hold."""
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Takes new keys [B, H, T, d] and values in; returns itself for both, which the attention function knows."""
        self.is_initialized = True
        self._waiting = _Waiting(key_states, value_states)
        return self, self

    def get_seq_length(self) -> int:
        """Length of the text so far, evicted tokens included."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Of the text: every layer makes its own mask."""
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        """Any text fits."""
        return -1

    def reset(self) -> None:
        """Forgets everything."""
        self.units, self.is_initialized = None, False
        self.seen = self.peak = self.generated = 0
        self.memory = {}

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Makes every row a copy of the row that it goes on from."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps some rows of the batch."""
        if self.units is not None:
            self.units = self.units.rows(lambda tensor: tensor[indices.to(tensor.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row of the batch."""
        if self.units is not None:
            self.units = self.units.rows(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    # Attention.

    def attend(
        self, query: Tensor, padding: Tensor | None, scaling: float, window: int | None, position_ids: Tensor | None
    ) -> Tensor:
        """See `CacheView`."""
        assert self._waiting is not None  # transformers updates before it attends
        keys, values = self._waiting.keys, self._waiting.values
        self._waiting = None
        new = self._new_tokens(query, keys, values, padding, position_ids)
        compact = self.setting.policy.positions == "compact"
        if compact:
            shift = self._compact_places(new) - new.positions
            query = rotate(query, shift[:, None], self.setting.frequencies)
            keys = rotate(keys, shift[:, None], self.setting.frequencies)
        groups = self.setting.groups[self.index]
        incoming = self._encoded(new, keys, values, groups, window)
        held = incoming.owned() if self.units is None else self.units.joined(incoming)
        found = attend(query, held, groups, self._visible(held, new, window), scaling)
        packed, share = self.setting.packed.get(self.index), query.shape[1] // keys.shape[1]
        out = restored(found, groups, share) if packed is None else packed.packed(found, groups, share)
        self.seen += query.shape[2]
        self.peak = max(self.peak, len(held))
        self._settle(held, incoming, new, groups)
        return out

    def _new_tokens(
        self, query: Tensor, keys: Tensor, values: Tensor, padding: Tensor | None, position_ids: Tensor | None
    ) -> NewTokens:
        tokens, step = query.shape[2], self.setting.step
        if step is not None:
            valid = step.valid
        else:
            # A token that comes alone is a generated one: only what is read can be filling.
            valid = None if padding is None or tokens == 1 else padding[:, -tokens:]
            if valid is not None and bool(valid.all()):
                valid = None
        if position_ids is None or position_ids.dim() != 2:
            position_ids = torch.arange(self.seen, self.seen + tokens, device=query.device)[None]
        taps = self.setting.taps
        return NewTokens(
            layer=self.index,
            queries=query,
            keys=keys,
            values=values,
            features=taps[self.index].take() if taps else None,
            valid=valid,
            positions=position_ids.expand(len(query), -1),
            memory=self.memory,
        )

    def _encoded(
        self, new: NewTokens, keys: Tensor, values: Tensor, groups: tuple[HeadGroup, ...], window: int | None
    ) -> Units:
        """The new tokens as they are stored."""
        selector, positions, shape = self.setting.selector, None, keys.shape[:3]
        packed = self.setting.packed.get(self.index)
        known = self.units is not None and self.units.positions is not None
        if new.valid is not None or known or window is not None or self.setting.needs_positions:
            places = new.positions if new.valid is None else new.positions.where(new.valid, NOT_TEXT)
            positions = places.to(torch.int32)[:, None].expand(shape)
            if self.units is not None and self.units.positions is None:
                raise ValueError("a batch without filling cannot go on with filling: begin a new cache")
        scores = None
        if selector is not None and selector.causal:
            scores = selector.score(new, None)
        return Units(tuple(group.encode(keys, values, packed) for group in groups), scores, positions)

    def _visible(self, held: Units, new: NewTokens, window: int | None) -> Tensor | None:
        """Which units each new token may look at, bool [B or 1, H or 1, T, N]; None for all."""
        tokens, count = new.queries.shape[2], len(held)
        if tokens == 1 and held.positions is None:
            return None
        device = new.queries.device
        visible = torch.ones(1, 1, tokens, count, dtype=torch.bool, device=device).tril(count - tokens)
        if held.positions is not None:
            places = held.positions[:, :, None]
            # Filling sees itself, since a row of nothing has no average.
            own = torch.arange(count, device=device) - (count - tokens) == torch.arange(tokens, device=device)[:, None]
            visible = visible & ((places != NOT_TEXT) | own)
            if window is not None:
                visible = visible & ((new.positions[:, None, :, None] - places < window) | own)
        return visible

    # Letting go.

    def _settle(self, held: Units, incoming: Units, new: NewTokens, groups: tuple[HeadGroup, ...]) -> None:
        policy, step, before = self.setting.policy, self.setting.step, self.units
        budget, protected = policy.budget_of(self.index), None
        self.units = held
        if budget is None or self.setting.selector is None:
            return
        if step is None:
            budget += policy.local
            self.generated += new.queries.shape[2]
            if policy.decode_every is None or self.generated < policy.decode_every:
                return
            self.generated = 0
        elif not step.evict:
            return
        else:
            protected = step.protected
        if len(held) <= budget:
            return
        ranking = self._ranking(held, new, protected if step is not None else self._latest(held, policy.local))
        keep = ranking.topk(budget, dim=2).indices.sort(dim=2).values
        if step is not None and before is not None and len(before) == budget and self.setting.in_place:
            kept = torch.zeros_like(ranking, dtype=torch.bool).scatter_(2, keep, True)
            self.units = before.replaced(~kept[..., :budget], incoming, kept[..., budget:], groups)
            return
        self.units = held.picked(keep, groups)
        if policy.positions == "compact":
            self._close_gaps(held, keep, groups)

    def _ranking(self, held: Units, new: NewTokens, protected: Tensor | None) -> Tensor:
        selector = self.setting.selector
        assert selector is not None
        if held.scores is not None:
            ranking = held.scores.float().clone()
        else:
            groups = self.setting.groups[self.index]
            both = [group.decode(*part) for group, part in zip(groups, held.parts, strict=True)]
            order = torch.tensor([head for group in groups for head in group.heads]).argsort()
            keys, values = (torch.cat([pair[i] for pair in both], dim=1)[:, order] for i in (0, 1))
            ranking = selector.score(new, HeldUnits(keys, values, held.positions)).float()
        if held.positions is not None:
            ranking = ranking.masked_fill(held.positions == NOT_TEXT, -torch.inf)
        if protected is not None:
            latest = ranking[..., -protected.shape[-1] :]
            latest.masked_fill_(protected[:, None], torch.inf)
        return ranking

    @staticmethod
    def _latest(held: Units, count: int) -> Tensor | None:
        """The last `count` units, which decoding never gives up."""
        shape = (len(held.parts[0][0]), count)
        return torch.ones(shape, dtype=torch.bool, device=held.parts[0][0].device) if count else None

    # Compact places: a unit's is its rank among the text that its head holds.

    def _compact_places(self, new: NewTokens) -> Tensor:
        """Places of the new tokens, [B, T]: they go on where what is held ends."""
        tokens, device = new.queries.shape[2], new.queries.device
        valid = torch.ones(1, tokens, dtype=torch.long, device=device) if new.valid is None else new.valid.long()
        first: Any = len(self)
        if self.units is not None and self.units.positions is not None:
            # All heads of a row hold equally much text.
            first = (self.units.positions[:, 0] != NOT_TEXT).sum(1, keepdim=True)
        places: Tensor = (first + valid.cumsum(1) - 1).clamp(min=0)
        return places.expand(len(new.queries), -1)

    def _close_gaps(self, held: Units, keep: Tensor, groups: tuple[HeadGroup, ...]) -> None:
        assert self.units is not None
        before, after = _ranks(held), _ranks(self.units)
        shift = after - (before.expand_as(held.parts[0][0][..., 0]) if before.dim() == 1 else before).gather(2, keep)
        keys, values = self.units.parts[0]
        turned = rotate(keys, shift, self.setting.frequencies)
        self.units = Units(((turned, values),), self.units.scores, self.units.positions)


def _ranks(units: Units) -> Tensor:
    """Places 0, 1, 2, .. of the text among the units, [N] or [B, H, N]."""
    if units.positions is None:
        return torch.arange(len(units), device=units.parts[0][0].device)
    return ((units.positions != NOT_TEXT).cumsum(2) - 1).clamp(min=0)
