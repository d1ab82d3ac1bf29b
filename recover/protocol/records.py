"""What a check keeps of each example: plain numbers, written as one JSON line, read back exactly.

A verdict is computed from records alone, so that a resumed run and an uninterrupted one cannot differ. Floats are
written with as many digits as Python needs to read the same float back. What is not finite (no threshold; a clamp that
overflows) becomes null, which JSON has; it reads as NaN where a number must be, as infinity where a norm must be, and
as None in a certificate and in the sections of a verdict.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, with_config

from recover.evidence.certificate import Certificate
from recover.search.solvers import WorstCase

Number = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]
Norm = Annotated[float, BeforeValidator(lambda value: math.inf if value is None else value)]
Figure = Annotated[
    float | None,
    BeforeValidator(lambda value: None if isinstance(value, float) and not math.isfinite(value) else value),
]
"""A number; None where it is not finite or could not be measured."""
STRICT = ConfigDict(extra="forbid")


@with_config(STRICT)
@dataclass(frozen=True)
class SearchRecord:
    """The solvers' own account of one example.

    Attributes:
        status, steps, score, slack: of the delta within the budget.
        smallest: the smallest norm that any solver found, budget or no budget.
        winner: the solver that found it.
        by_solver: what each found.
        draws_reached: share of random draws at the budget's norm that brought the behavior back.
    """

    status: str
    steps: int
    score: Number
    slack: Number
    smallest: Norm
    winner: str | None
    by_solver: Mapping[str, Norm]
    draws_reached: Number

    @property
    def by_gradient(self) -> float:
        """The smallest norm that the solvers other than `random` found."""
        return min((norm for name, norm in self.by_solver.items() if name != "random"), default=math.inf)


@with_config(STRICT)
@dataclass(frozen=True)
class CertificateRecord:
    """The certificate of one delta: what `Certificate` holds of one example, norms in units of the residual."""

    shows: Annotated[bool, Field(description="whether the behavior is back, with the clamp held")]
    score: Annotated[Figure, Field(description="the behavior's score, recovered")]
    slack: Annotated[Figure, Field(description="the behavior's slack, recovered; it shows where positive")]
    defended_slack: Annotated[Figure, Field(description="the behavior's slack, defended")]
    norm: Annotated[Figure, Field(description="norm of the delta")]
    relative_norm: Annotated[Figure, Field(description="norm as a share of the defended residual's")]
    displacement: Annotated[Figure, Field(description="norm of how far the clamp moves the residual")]
    constraint_residual: Annotated[Figure, Field(description="||A^T delta|| / (||A|| ||delta||)")]
    preactivation_shift: Annotated[tuple[Figure, ...], Field(description="shift of each clamped pre-activation")]
    threshold_margin: Annotated[tuple[Figure, ...], Field(description="defended pre-activation minus threshold")]
    drift: Annotated[Figure, Field(description="norm of the change of the clamped features")]
    relative_drift: Annotated[Figure, Field(description="drift as a share of the features' norm")]
    decode_drift: Annotated[Figure, Field(description="norm of what that drift writes to the residual")]
    clamp_floor_violation: Annotated[Figure, Field(description="sinking of raised features, share of their norm")]
    rounding: Annotated[Figure, Field(description="shifts and drifts up to this count as rounding")]
    held: Annotated[bool, Field(description="whether the clamped features stayed where they were")]
    dormant: Annotated[float, Field(description="number of inactive clamped features, over positions")]
    reactivated: Annotated[float, Field(description="number of those that became active")]
    displacement_everywhere: Annotated[
        Figure, Field(description="norm of how far the clamp moves the residual, over all positions")
    ] = None

    @property
    def suppressed(self) -> bool:
        """The defended replay agrees that the behavior is gone; a model in half precision may have it otherwise."""
        return self.defended_slack is not None and self.defended_slack <= 0


@with_config(STRICT)
@dataclass(frozen=True)
class SmallestRecord:
    """The certificate of the smallest delta: whether it holds, and its size."""

    shows: Annotated[bool, Field(description="whether the behavior is back, with the clamp held")]
    held: Annotated[bool, Field(description="whether the clamped features stayed where they were")]
    slack: Annotated[Figure, Field(description="the behavior's slack, recovered; it shows where positive")]
    norm: Annotated[Figure, Field(description="norm of the delta")]
    relative_norm: Annotated[Figure, Field(description="norm as a share of the defended residual's")]
    displacement: Annotated[Figure, Field(description="norm of how far the clamp moves the residual")]
    constraint_residual: Annotated[Figure, Field(description="||A^T delta|| / (||A|| ||delta||)")]


@with_config(STRICT)
@dataclass(frozen=True)
class PlaceboRecord:
    """The search for an unrelated target of the same kind.

    Attributes:
        slack: of the defended state: how far the placebo is from showing.
        smallest: its smallest norm, by the solvers that follow gradients.
        within: reached within the budget.
    """

    slack: Number
    smallest: Norm
    within: bool


@with_config(STRICT)
@dataclass(frozen=True)
class UndoingRecord:
    """What the delta within the budget does downstream, as `recover.evidence.undoing` measures it."""

    layers: tuple[Number, ...]
    likeness: Number
    unrelated: bool
    restored: Number
    without_find: bool
    without_clamp: bool


@with_config(STRICT)
@dataclass(frozen=True)
class ReplyRecord:
    """How the model's reply reads under the delta within the budget, clamps and delta live (`recover.tasks.replies`).

    Attributes:
        relative_drift, preactivation_shift: the largest along what was said, against the same text without the delta.
    """

    refusal: bool
    safety_cue: bool
    degenerate: bool
    base_like: bool
    strict_base_like: bool
    relative_drift: Number
    preactivation_shift: Number

    @property
    def non_refusal(self) -> bool:
        """Opens with neither a refusal nor a safety cue."""
        return not self.refusal and not self.safety_cue


@with_config(STRICT)
@dataclass(frozen=True)
class PartRecord:
    """One part of the delta within the budget, as `recover.evidence.attribution.parts.View` has it.

    Attributes:
        non_refusal, base_like: of what the model says where the part alone is added; None where that is not read.
    """

    norm: Number
    first_order: Number
    integrated: Number
    replay_score: Number
    replay_slack: Number
    knockout_score: Number
    knockout_slack: Number
    non_refusal: bool | None = None
    base_like: bool | None = None


@with_config(STRICT)
@dataclass(frozen=True)
class ExampleRecord:
    """One example: accounting for all, everything else for valid flips.

    Attributes:
        base_slack, defended_slack: in logits; the behavior shows where positive.
        strict_base_slack, strict_defended_slack: the same for the predicate that transfer is read with.
        certificate: of the delta within the budget.
        smallest: of the smallest delta.
        placebo: None where there is no unrelated target that does not show already.
        write_orthogonal: the search under C1+.
        reached_at: for each budget of the curve, whether a search at that budget alone brought the behavior back.
        longer: whether a search of twice the steps did, at the budget.
        undefended: with the clamp off, from where it would have put the state, a search came back.
        text: the prompt, only where it was asked for.
        answered: where the behavior is a whole answer, whether the model's own opens with neither a refusal nor a cue.
        refused: whether the reply under the defense opens with a refusal.
        reply: what is said under the delta.
        attribution: the parts of the delta by name.
        undoing: what the delta does downstream, beside what lifting the clamp does.
    """

    id: str
    base_slack: Number
    defended_slack: Number
    strict_base_slack: Number
    strict_defended_slack: Number
    search: SearchRecord | None = None
    certificate: CertificateRecord | None = None
    smallest: SmallestRecord | None = None
    placebo: PlaceboRecord | None = None
    write_orthogonal: PlaceboRecord | None = None
    reached_at: dict[str, bool] | None = None
    longer: bool | None = None
    undefended: bool | None = None
    text: str | None = None
    answered: bool | None = None
    refused: bool | None = None
    reply: ReplyRecord | None = None
    attribution: Mapping[str, PartRecord] | None = None
    undoing: UndoingRecord | None = None

    @property
    def shows_at_base(self) -> bool:
        return self.base_slack > 0 and self.answered is not False

    @property
    def shows_when_defended(self) -> bool:
        """The behavior shows in spite of the defense; a whole answer does where it is not refused."""
        return self.defended_slack > 0 or self.refused is False

    @property
    def valid_flip(self) -> bool:
        """The behavior shows at base and not when defended."""
        return self.shows_at_base and not self.shows_when_defended

    @property
    def strict_flip(self) -> bool:
        """A valid flip by the stricter predicate, with which transfer is read."""
        refused = self.answered is not False and self.refused is not False
        return refused and self.strict_base_slack > 0 and not self.strict_defended_slack > 0

    @property
    def back(self) -> bool:
        """By certificate: the behavior shows under the delta, with the clamped features where they were.

        A whole answer shows where what is said under the delta, freely, is like the model's own (`base_like`).
        """
        if self.certificate is None or not self.certificate.held:
            return False
        return self.certificate.shows if self.reply is None else self.reply.base_like

    def to_json(self) -> str:
        """One line of `examples.jsonl`."""
        values = {name: value for name, value in asdict(self).items() if name != "text" or value is not None}
        return json.dumps(without_nan(values | {"valid_flip": self.valid_flip}), allow_nan=False)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> ExampleRecord:
        """From the plain values of finished units, merged.

        Raises:
            ValueError: they are not those of an example of this version.
        """
        return _RECORD.validate_python(dict(values))

    @classmethod
    def from_json(cls, line: str) -> ExampleRecord:
        """Read one line of `examples.jsonl`.

        Raises:
            ValueError: it is not such a line.
        """
        values = json.loads(line)
        if not isinstance(values, dict) or not isinstance(values.pop("valid_flip", None), bool):
            raise ValueError("not the record of an example")
        return cls.of(values)


_RECORD = TypeAdapter(ExampleRecord)


def search_values(found: WorstCase) -> list[dict[str, Any]]:
    """The values of a `SearchRecord` for each example of a batch."""
    return [
        without_nan(
            {
                "status": found.status[row].name,
                "steps": int(found.steps[row]),
                "score": float(found.score[row]),
                "slack": float(found.slack[row]),
                "smallest": float(found.norm[row]),
                "winner": found.winner[row],
                "by_solver": {name: float(norms[row]) for name, norms in found.by_solver.items()},
                "draws_reached": float(found.draws_reached[row]),
            }
        )
        for row in range(len(found.winner))
    ]


def certificate_values(certificate: Certificate) -> list[dict[str, Any]]:
    """One plain dictionary an example of a batch."""
    columns = {name: values.tolist() for name, values in vars(certificate).items()}
    return [
        without_nan({name: values[row] for name, values in columns.items()}) for row in range(len(certificate.shows))
    ]


def without_nan(value: Any) -> Any:
    """Plain values, with None for every number that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    return [without_nan(item) for item in value] if isinstance(value, list | tuple) else value
