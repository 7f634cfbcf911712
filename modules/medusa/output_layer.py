"""A causal language model by role: the state that its output matrix reads, and what becomes of the product."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from modules.hidden_states import side_by_side, tapped

_PROBE = 4  # tokens
_FACTORS = ("logit_scale", "logits_scaling", "lm_head_multiplier")
_CAPS = ("final_logit_softcapping",)


class OutputLayer:
    """From the last hidden state, after the final norm, to the backbone's own logits.

    Holds the backbone's module without registering it: the output matrix is read, never trained and never stored.

    Attributes:
        matrix: the backbone's output embedding, a module [V, D].
        scale, soft_cap: what the backbone does to the product: times `scale`, then soft_cap * tanh(x / soft_cap).
    """

    def __init__(self, matrix: nn.Module, scale: float = 1.0, soft_cap: float | None = None) -> None:
        self.matrix, self.scale, self.soft_cap = matrix, scale, soft_cap

    @classmethod
    def of(cls, model: nn.Module) -> OutputLayer:
        """The output layer of a causal language model.

        What the model does to the product is read from its configuration and checked on a few tokens, so that a model
        that computes its logits in another way is refused instead of being drafted for wrongly.

        Raises:
            ValueError: not a causal language model, or its logits are not a known function of its last hidden state.
        """
        matrix = getattr(model, "get_output_embeddings", lambda: None)()
        if matrix is None:
            raise ValueError(f"a {type(model).__name__} has no output matrix: give a causal language model")
        hidden, entered, wanted = _probe(model, matrix)
        if not _agree(hidden, entered):  # decoding hands over what enters the matrix, training the last hidden state
            raise ValueError(
                f"a {type(model).__name__} feeds its output matrix something else than its last hidden state: heads "
                "trained on the one would guess from the other"
            )
        for scale, soft_cap in _known_forms(model):
            layer = cls(matrix, scale, soft_cap)
            if _agree(layer.logits(hidden), wanted):
                return layer
        raise ValueError(
            f"a {type(model).__name__}'s logits are no known function of its last hidden state: heads on it would guess"
            " other tokens than it does"
        )

    @property
    def weight(self) -> Tensor:
        """The backbone's output matrix."""
        return cast(Tensor, self.matrix.weight)

    @property
    def bias(self) -> Tensor | None:
        """Its bias, where it has one."""
        return cast("Tensor | None", getattr(self.matrix, "bias", None))

    def rows(self, tokens: Tensor) -> Tensor:
        """The matrix's rows of tokens [...], each scaled to a mean square of one: [..., D]."""
        rows = functional.embedding(tokens, self.weight.detach())
        return functional.rms_norm(rows.float(), rows.shape[-1:]).to(rows.dtype)

    def row_scales(self) -> Tensor:
        """What `rows` scales each of the matrix's rows by, [V, 1], for who reads a few of them often."""
        weight = self.weight.detach()
        square = torch.linalg.vector_norm(weight, dim=-1, keepdim=True, dtype=torch.float32).square() / weight.shape[1]
        return torch.rsqrt(square + torch.finfo(torch.float32).eps)

    def learned(self) -> list[nn.Parameter]:
        """What is trained of it: LoRA on the output matrix (Medusa-2), else nothing."""
        return [parameter for parameter in self.matrix.parameters() if parameter.requires_grad]

    def product(self, hidden: Tensor) -> Tensor:
        """The bare product [..., V], in the matrix's dtype."""
        return cast(Tensor, self.matrix(hidden.to(self.weight.dtype)))

    def finish(self, product: Tensor) -> Tensor:
        """The backbone's logits, given a product with a matrix."""
        if self.scale != 1.0:
            product = product * self.scale
        if self.soft_cap is not None:
            product = torch.tanh(product / self.soft_cap) * self.soft_cap
        return product

    def logits(self, hidden: Tensor) -> Tensor:
        """The backbone's own logits [..., V] of last hidden states [..., D]."""
        return self.finish(self.product(hidden))

    def logits_among(self, token_ids: Tensor | None) -> Callable[[Tensor], Tensor]:
        """`logits` of some tokens alone, [..., V'] for int64 [V'], the others not being computed where possible."""
        if token_ids is None:
            return self.logits
        if type(self.matrix) is not nn.Linear:  # LoRA, quantised
            return lambda hidden: self.logits(hidden)[..., token_ids]
        weight = self.weight.detach()[token_ids]
        bias = None if self.bias is None else self.bias.detach()[token_ids]
        return lambda hidden: self.finish(functional.linear(hidden.to(weight.dtype), weight, bias))


def last_hidden_state(model: nn.Module, **inputs: Any) -> Tensor:
    """The state after the final norm [B, T, D], without the output matrix's product."""
    return cast(Tensor, decoder_of(model)(**inputs).last_hidden_state)


def features(model: nn.Module, layers: Sequence[int], **inputs: Any) -> Tensor:
    """The same with the outputs of some decoder layers beside it, [B, T, (1 + n) D]; see `side_by_side`."""
    with tapped(model, layers) as outputs:
        return side_by_side(last_hidden_state(model, **inputs), outputs, layers)


def decoder_of(model: nn.Module) -> Callable[..., Any]:
    """The model without its output matrix.  Raises ValueError where there is none."""
    decoder = cast(Any, getattr(model, "base_model", None))
    if decoder is None or decoder is model:
        raise ValueError(f"a {type(model).__name__} has no decoder apart from its output matrix")
    return cast(Callable[..., Any], decoder)


@torch.no_grad()
def _probe(model: nn.Module, matrix: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """(last hidden state, what enters the output matrix, logits) of a few tokens."""
    ids = torch.arange(_PROBE, device=next(model.parameters()).device)[None]
    hidden, entered = last_hidden_state(model, input_ids=ids, use_cache=False), []
    hook = matrix.register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    try:
        logits = cast(Any, model)(input_ids=ids, use_cache=False).logits
    finally:
        hook.remove()
    return hidden, entered[0], logits


def _known_forms(model: nn.Module) -> Iterator[tuple[float, float | None]]:
    """(scale, soft cap) as the configuration may mean them; two families use one name for a factor and a divisor."""
    config = getattr(model, "config", None)
    values = [getattr(config, name, None) for name in _FACTORS]
    caps = [getattr(config, name, None) for name in _CAPS]
    soft_cap = next((float(cap) for cap in caps if cap), None)
    factors = [1.0]
    for value in values:
        if isinstance(value, int | float) and value:
            factors += [float(value), 1.0 / float(value)]
    for scale in factors:
        yield scale, soft_cap
        if soft_cap is not None:
            yield scale, None


def _agree(ours: Tensor, theirs: Tensor) -> bool:
    bound = 8 * torch.finfo(theirs.dtype).eps
    return torch.allclose(ours.to(theirs.dtype), theirs, rtol=bound, atol=bound * float(theirs.abs().max()))
