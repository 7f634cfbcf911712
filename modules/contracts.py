"""The families of modules: short abstract classes that learned modules and untrained baselines share.

Units are counted in call order, from 0; steps are sampler steps, from 0.  Features travel as tuples of tensors, one
per stream of the block: `(hidden,)`, or `(hidden, encoder_hidden)` where a block carries image and text side by side.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, Self, TypeAlias

from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from modules.decode_host.draft import Draft, DraftState
    from modules.kv_host.layer import HeldUnits, NewTokens
    from modules.kv_host.roles import AttentionSite
    from modules.kv_host.units import HeadGroup

Granularity: TypeAlias = Literal["block", "submodule", "span", "model"]
GRANULARITIES: tuple[Granularity, ...] = ("block", "submodule", "span", "model")
Features: TypeAlias = tuple[Tensor, ...]


class AdapterEntry(Protocol):
    """What `attach` reads of an adapter's manifest (`checkpoints.manifest.Manifest`)."""

    @property
    def module(self) -> dict[str, Any]:
        """The module's config dataclass as a dict."""


class Handle(ABC):
    """What attaching returns: undoes itself, and knows what the pipeline must be called with.

    `call_kwargs` goes into `pipe(...)`.  As a context manager it detaches on leaving.
    """

    def __init__(self) -> None:
        self.call_kwargs: dict[str, Any] = {}

    @abstractmethod
    def detach(self) -> None:
        """Takes everything back; calling it again does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()


class Selector(ABC):
    """Decides which units of a step are computed.

    `static` members decide from step and unit alone: the host then settles a whole step before it starts, and passes
    no features.  `context` is set by the host: the name of the running denoising call (diffusers' cache context) where
    a pipeline calls the transformer several times per step, else None; state has to be kept per context.
    """

    static: ClassVar[bool] = True
    context: str | None = None

    @property
    def granularities(self) -> tuple[Granularity, ...]:
        """Where the decision makes sense."""
        return GRANULARITIES

    def begin(self, num_steps: int | None, units: int) -> None:  # noqa: B027 - most members keep nothing
        """Starts a trajectory: forget the last one.  `num_steps` is None where nobody announced it."""

    @abstractmethod
    def computes(self, step: int, unit: int, hidden: Tensor | None) -> bool:
        """Whether the unit runs.  `hidden` is its input [B, T, D], None for static members; never read on the host."""

    def memory_bytes(self) -> int:
        """Bytes of the tensors held now; static members hold none."""
        return 0


class Predictor(ABC):
    """Stands in for units that are not computed.  State is kept per (`context`, unit), see `Selector.context`.

    `history` is how many of a unit's last observations a prediction uses: the host frees a slot that no later
    prediction of the trajectory needs.
    """

    context: str | None = None
    history: int = 1

    @property
    def granularities(self) -> tuple[Granularity, ...]:
        """Where the prediction makes sense."""
        return GRANULARITIES

    @abstractmethod
    def ready(self, unit: int) -> bool:
        """Whether `predict` has something to go by; the host computes the unit otherwise."""

    @abstractmethod
    def observe(self, unit: int, step: int, inputs: Features, outputs: Features) -> None:
        """Takes note of a computed unit."""

    @abstractmethod
    def predict(self, unit: int, step: int, inputs: Features) -> Features:
        """The outputs that stand in for the unit's, same shapes and dtypes as those observed."""

    @abstractmethod
    def release(self, unit: int) -> None:
        """Forgets one unit and frees what was kept of it."""

    @abstractmethod
    def reset(self) -> None:
        """Forgets everything and frees it."""

    @abstractmethod
    def memory_bytes(self) -> int:
        """Bytes of the tensors held now."""


class Drafter(ABC):
    """Guesses the tokens that follow; the decode host verifies a step's guesses in one backbone call.

    Whatever is guessed, the text is the backbone's own: guesses decide only how many calls it takes.  `needs_hidden`
    members read the state's `hidden`, which is not kept for the others; it also has the outputs of their
    `hidden_layers`, decoder layers by number from 1 (`modules.hidden_states.side_by_side`).
    """

    needs_hidden: bool = True
    hidden_layers: Sequence[int] = ()

    def begin(self, prompts: Sequence[Sequence[int]]) -> None:  # noqa: B027 - most members keep nothing
        """Starts a generation with the ids of each sequence, without padding: forget the last one."""

    @abstractmethod
    def propose(self, state: DraftState) -> Draft:
        """Guesses below the state's root; no guess at all is `Draft(Tree.chain(0), root.new_empty(B, 0))`."""

    def end(self, rows: Sequence[Sequence[int]]) -> None:  # noqa: B027 - most members keep nothing
        """Ends a generation: all ids of each sequence, without padding."""

    @abstractmethod
    def memory_bytes(self) -> int:
        """Bytes held: learned tensors and what was remembered."""


class TokenSelector(ABC):
    """Decides which units of a KV cache stay: a score per token and KV head, of which the highest stay.

    `causal` members score a token from itself and what came before: its score is taken once, when the token enters,
    and never changes.  The others score everything that is held anew at every eviction.
    """

    causal: ClassVar[bool] = True
    needs_features: ClassVar[bool] = False  # reads queries, keys and values from before their rotation
    needs_positions: ClassVar[bool] = False  # reads the places of held units in the text

    @abstractmethod
    def score(self, new: NewTokens, held: HeldUnits | None) -> Tensor:
        """Scores in any unit, higher stays: [B, H, T] of the new tokens, or of all held units [B, H, N] (not causal).

        Args:
            held: everything that the layer holds, the new tokens last; None for causal members.
        """

    def check(self, sites: Sequence[AttentionSite]) -> None:  # noqa: B027 - most members fit any model
        """Raises ValueError unless it fits a model with these attention layers."""

    def memory_bytes(self) -> int:
        """Bytes of learned tensors."""
        return 0


class Codec(ABC):
    """Decides how kept units are stored: which coordinates of keys and values, per layer and KV head."""

    @abstractmethod
    def groups(self, layer: int) -> Sequence[HeadGroup]:
        """The KV heads of a layer by stored width; together all heads, each once."""

    def check(self, sites: Sequence[AttentionSite]) -> None:  # noqa: B027
        """Raises ValueError unless it fits a model with these attention layers."""

    def memory_bytes(self) -> int:
        """Bytes of the bases."""
        return 0
