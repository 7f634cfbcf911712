"""Putting a cache of ours into a model: a selector, a codec, or one of each from two adapters."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.generation import GenerationMode

from modules.contracts import Codec, Handle, TokenSelector
from modules.generate_call import PlainGenerate
from modules.kv_host.cache import KVCache, empty_cache, plain_groups
from modules.kv_host.interface import NAME, register
from modules.kv_host.policy import CachePolicy, PrefillStep, prefill_steps
from modules.kv_host.roles import FeatureTap, attention_sites, rotary_frequencies, rotated_as_a_whole
from modules.kv_host.units import PackedValues

_MODES = (
    GenerationMode.GREEDY_SEARCH,
    GenerationMode.SAMPLE,
    GenerationMode.BEAM_SEARCH,
    GenerationMode.BEAM_SAMPLE,
)


class KVHost:
    """A model whose `generate` keeps its state in a cache of ours.

    Attributes:
        sites: the attention layers.
        selector, codec, policy: who stays, how it is stored, and how much.
        packed: by layer, how projections that a codec has merged lay their values out.
        last: the cache of the latest `generate` or `prefill`, for its figures.
    """

    def __init__(self, model: Any) -> None:
        self.sites = attention_sites(model)
        self._own = PlainGenerate(model)
        self.model = model
        self.selector: TokenSelector | None = None
        self.codec: Codec | None = None
        self.policy = CachePolicy()
        self.last: KVCache | None = None
        self._implementation = model.config._attn_implementation
        self._plain_prefill = model._prefill
        self.packed: dict[int, PackedValues] = {}
        self._taps: dict[int, FeatureTap] = {}
        self._hooks: list[Any] = []
        register()
        model.set_attn_implementation(NAME)
        model.generate, model._prefill = self._generate, self._prefill

    def close(self) -> None:
        """Gives the model everything back."""
        self._listen(False)
        del self.model.generate, self.model._prefill
        self.model.set_attn_implementation(self._implementation)

    def change(self, *, selector: TokenSelector | None, codec: Codec | None, policy: CachePolicy | None = None) -> None:
        """Sets all three for the caches that are made from now on.

        Raises:
            ValueError: they do not fit the model, or one another; nothing is changed.
        """
        policy = self.policy if policy is None else policy
        self.sites = attention_sites(self.model)  # an adapter that comes or goes may bring projections of its own
        for member in (selector, codec):
            if member is not None:
                member.check(self.sites)
        if isinstance(policy.budget, tuple) and len(policy.budget) != len(self.sites):
            raise ValueError(f"budget names {len(policy.budget)} layers, and the model has {len(self.sites)}")
        if self.packed and selector is not None and selector.needs_features:
            raise ValueError("merged projections no longer put out what this selector reads: unmerge them first")
        if policy.positions == "compact":
            if codec is not None:
                raise ValueError("compact positions turn stored keys, which a codec has projected: use original")
            rotary_frequencies(self.model)
        self.selector, self.codec, self.policy = selector, codec, policy
        self._listen(selector is not None and selector.needs_features)

    def _listen(self, wanted: bool) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._taps = [], {}
        if not wanted:
            return
        for site in self.sites:
            tap = self._taps[site.index] = FeatureTap(site)
            self._hooks += [site.module.register_forward_pre_hook(_only_for_ours(tap), with_kwargs=True), *tap.start()]

    def unit_bytes(self, stored: bool = True) -> int:
        """Bytes of a token in all layers and heads: as it is stored, with its scores, or as the model has it."""
        parameter = next(value for value in self.model.parameters() if value.is_floating_point())
        total = 0
        for site in self.sites:
            if not stored:
                total += 2 * site.kv_heads * site.head_dim * parameter.element_size()
                continue
            for group in plain_groups(site, self.codec):
                widths = [site.head_dim if width is None else width for width in group.widths()]
                total += len(group.heads) * sum(widths) * parameter.element_size()
            if self.selector is not None and self.selector.causal:
                total += 4 * site.kv_heads
        return total

    def cache(self, **changes: Any) -> KVCache:
        """An empty cache, for `past_key_values=`.

        Args:
            changes: of the policy, for this cache alone.
        """
        policy = replace(self.policy, **changes)
        frequencies = rotary_frequencies(self.model) if policy.positions == "compact" else torch.zeros(0)
        self.last = empty_cache(
            self.sites,
            policy,
            self.selector,
            self.codec,
            taps=dict(self._taps),
            frequencies=frequencies,
            packed=dict(self.packed),
            needs_positions=self.selector is not None and self.selector.needs_positions,
        )
        return self.last

    @torch.no_grad()
    def prefill(self, input_ids: Tensor, attention_mask: Tensor | None = None, **changes: Any) -> KVCache:
        """Reads a text [B, T] into a new cache, chunk by chunk, and evicts on the way.

        Args:
            attention_mask: [B, T], 0 where a sequence is filled up; None where all is text.
            changes: of the policy, for this cache alone.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        cache = self.cache(**changes)
        self._read(input_ids, mask.bool(), cache, {})
        return cache

    def _read(self, input_ids: Tensor, mask: Tensor, cache: KVCache, extra: dict[str, Any]) -> Any:
        """Runs the columns that the cache has not seen; returns the last call's outputs."""
        seen, setting = cache.get_seq_length(), cache.setting
        offset = mask.shape[1] - input_ids.shape[1]  # a conversation may go on with its new tokens alone
        if seen == 0 and not bool(mask.all()):
            setting.needs_positions = True
        outputs = None
        with rotated_as_a_whole(self.model, mask.shape[1]):
            for step in prefill_steps(mask, seen, setting.policy):
                outputs = self._read_step(step, input_ids, offset, cache, extra)
        cache.read_to(mask.shape[1])
        return outputs

    def _read_step(
        self, step: PrefillStep, input_ids: Tensor, offset: int, cache: KVCache, extra: dict[str, Any]
    ) -> Any:
        setting, count = cache.setting, cache.get_seq_length()
        ids = input_ids.gather(1, step.columns - offset)
        valid = torch.ones_like(ids, dtype=torch.bool) if step.valid is None else step.valid
        setting.step = step
        try:
            return self.model(
                input_ids=ids,
                attention_mask=torch.cat([valid.new_ones(len(ids), count), valid], dim=1),
                position_ids=step.positions,
                past_key_values=cache,
                use_cache=True,
                return_dict=True,
                **extra,
            )
        finally:
            setting.step = None

    # What stands in for the model's own.

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        rest, call, config = self._own.read(args, kwargs)
        given = call.get("past_key_values")
        if given is not None and not isinstance(given, KVCache):
            raise ValueError(
                f"the model keeps its state in a cache of its adapter, and past_key_values is a "
                f"{type(given).__name__}: leave it out, give handle.cache(), or detach the adapter"
            )
        mode = config.get_generation_mode(call.get("assistant_model"))
        if mode not in _MODES or call.get("custom_generate") is not None:
            raise ValueError(
                f"this is {mode.value} or a custom_generate, which take tokens back, and an evicted token is gone: "
                "use greedy decoding, sampling or beams, or detach the adapter"
            )
        if given is None and config.use_cache is not False:
            call["past_key_values"] = self.cache()
        elif given is not None:
            self.last = given
        return self._own.plain(*rest, **call)

    def _prefill(
        self, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        cache = model_kwargs.get("past_key_values")
        if not isinstance(cache, KVCache):
            return self._plain_prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)
        if model_kwargs.get("inputs_embeds") is not None:
            raise ValueError("the prompt is given as inputs_embeds, which is not read in chunks: give input_ids")
        mask = model_kwargs.get("attention_mask")
        if mask is None:
            columns = getattr(generation_config, "_mask_length", input_ids.shape[1])
            mask = torch.ones(len(input_ids), columns, dtype=torch.long, device=input_ids.device)
        extra = {
            name: value
            for name, value in model_kwargs.items()
            if name not in ("attention_mask", "position_ids", "past_key_values", "inputs_embeds", "use_cache")
        }
        return self._read(input_ids, mask.bool(), cache, extra)


class KVHandle(Handle):
    """A selector, a codec or both at work in a model's cache.

    A model takes one selector and one codec, from one handle or from two: then what one chose is stored as the other
    says.

    Attributes:
        host: what both share.
    """

    def __init__(
        self, model: Any, selector: TokenSelector | None, codec: Codec | None, policy: CachePolicy | None
    ) -> None:
        super().__init__()
        host = _host_of(model)
        held: tuple[Any, Any] = (None, None) if host is None else (host.selector, host.codec)
        for kind, mine, theirs in zip(("selector", "codec"), (selector, codec), held, strict=True):
            if mine is not None and theirs is not None:
                raise ValueError(
                    f"the model's cache has a {kind} already, a {type(theirs).__name__}: detach it before another one"
                )
        new = host is None
        self.host = host = KVHost(model) if host is None else host
        try:
            host.change(selector=selector or host.selector, codec=codec or host.codec, policy=policy)
        except ValueError:
            if new:
                host.close()
            raise
        self._mine = (selector is not None, codec is not None)
        self._open = True

    @property
    def policy(self) -> CachePolicy:
        """How much is kept, from the next cache on."""
        return self.host.policy

    def use(self, **changes: Any) -> None:
        """Changes the policy, as `handle.use(budget=4096, chunk=1024)`; `budget=None` keeps everything."""
        host = self.host
        host.change(selector=host.selector, codec=host.codec, policy=replace(host.policy, **changes))

    def cache(self, **changes: Any) -> KVCache:
        """See `KVHost.cache`."""
        return self.host.cache(**changes)

    def resume(self, cache: KVCache) -> KVCache:
        """A copy of a cache that goes on under this handle: one to branch from, or one whose handle is detached.

        Raises:
            ValueError: its units are stored in another way than this handle's codec stores them.
        """
        mine = self.host.cache()
        if (stored := cache.layout()) != (wanted := mine.layout()):
            raise ValueError(
                f"the cache is stored as {stored[0]} and this handle stores {wanted[0]}: read the text again"
            )
        self.host.last = cache.resumed(mine.setting)
        return self.host.last

    def prefill(self, input_ids: Tensor, attention_mask: Tensor | None = None, **changes: Any) -> KVCache:
        """See `KVHost.prefill`."""
        return self.host.prefill(input_ids, attention_mask, **changes)

    def detach(self) -> None:
        """Takes its own part out of the cache; the last one to go gives the model everything back."""
        if not self._open:
            return
        self._open = False
        host, (selector, codec) = self.host, self._mine
        rest: tuple[Any, Any] = (None if selector else host.selector, None if codec else host.codec)
        if rest == (None, None):
            host.close()
        else:
            host.change(selector=rest[0], codec=rest[1], policy=CachePolicy() if selector else None)


def attach_cache(
    model: Any, *, selector: TokenSelector | None = None, codec: Codec | None = None, policy: CachePolicy | None = None
) -> KVHandle:
    """Lets a model keep its state as a selector and a codec say; `generate` is called as before.

    Raises:
        ValueError: they do not fit the model, its `generate` is replaced already, or it has one of their kind.
    """
    return KVHandle(model, selector, codec, policy)


def _host_of(model: Any) -> KVHost | None:
    host = getattr(getattr(model, "generate", None), "__self__", None)
    return host if isinstance(host, KVHost) else None


def _only_for_ours(tap: FeatureTap) -> Any:
    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        tap.wanted = isinstance(kwargs.get("past_key_values"), KVCache)

    return hook
