"""The verdict as an object: one frozen model a section of `verdict.json`, one field a figure with its unit and meaning.

Attributes have the names of the JSON keys, nested in the same way: `verdict.recovery.rate` is `recovery.rate` there.
`verdict.schema.json` is generated from these models (`recover.protocol.schema`), and so is the table in the reference.

- A figure that is not finite, or that could not be measured, is None (`null`). A *norm* that is None is infinite: no
  perturbation of any size was found.
- A part of the protocol that was not run is None or an empty tuple, and a gate with `passed=None` says why.
- Norms are in units of the residual stream. Rates, shares and p-values lie between 0 and 1; intervals are 95%.

How the figures are computed is in `recover.protocol.verdict`; what they decide, in
`recover.evidence.content`, `own_rule` and `rules`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, WithJsonSchema, with_config
from pydantic.json_schema import SkipJsonSchema

from recover.evidence.readings import Count, Reading
from recover.evidence.rules import Rules
from recover.numerics.statistics import wilson
from recover.protocol.knowledge_model import Knowledge
from recover.protocol.power_model import PowerFigures
from recover.protocol.records import STRICT, ExampleRecord
from recover.protocol.section import Figure, Interval, Section
from recover.protocol.uses_model import UsesFigures

SCHEMA: Literal["recover.verdict/3"] = "recover.verdict/3"

Kind = Literal["INVALID", "INCONCLUSIVE", "NOT_RECOVERED_AT_BUDGET", "RECOVERABLE"]
Placement = Literal["after_clamp", "before_clamp"]


Known = Annotated[
    bool | None,
    BeforeValidator(lambda value: None if value == "unknown" else value),
    PlainSerializer(lambda value: "unknown" if value is None else value),
    WithJsonSchema({"enum": [True, False, "unknown"]}),
]


class ClampSummary(Section):
    """One clamp of the defense."""

    site: str = Field(description="hook name of the clamped residual stream")
    k: int = Field(ge=1, description="number of clamped features")
    mode: Literal["set", "scale", "floor"] = Field(description="what the clamp does to a feature's activation")
    value: float | tuple[float, ...] = Field(description="the mode's value; one for all features, or one for each")
    only_active: bool = Field(description="whether features that are zero stay zero")
    positions: Literal["all", "last", "prompt", "answer"] = Field(description="token positions that are clamped")


class ThreatModel(Section):
    """The perturbation that is allowed, and the defense that it faces."""

    access: str = Field(description="what the search may read and change")
    sites: tuple[str, ...] = Field(min_length=1, description="hook names of the clamped sites")
    positions: str = Field(description="token positions that a perturbation changes")
    delta_sites: tuple[str, ...] = Field(min_length=1, description="hook names where a perturbation is added")
    placement: Placement = Field(description="whether a perturbation is added after or before the clamp")
    constraint: str = Field(description="what an admissible perturbation must leave unchanged")
    norm: str = Field(description="how the size of a perturbation is measured")
    budget: float = Field(gt=0, description="largest norm allowed")
    clamp: Literal["live", "frozen"] = Field(description="whether the clamp acts on the perturbed state")
    skip_first: Count = Field(description="number of first tokens that are never clamped")
    dtype: str = Field(description="number format of the searched model")
    clamps: tuple[ClampSummary, ...] = Field(min_length=1, description="the clamps of the defense")


class SiteFit(Section):
    """How well one SAE describes its site on these prompts."""

    site: str = Field(description="hook name where the SAE is used")
    explained_variance: Figure = Field(description="share of the residual's variance that the SAE reconstructs")
    l0: Figure = Field(description="mean number of active features a token")
    loss_recovered: Figure = Field(description="share of the loss that the SAE's reconstruction preserves")
    better_site: str = Field(description="site that the SAE explains best; `site` itself when all is well")
    better_by: Figure = Field(description="how much more variance the SAE explains there")
    tokens: Count = Field(description="number of tokens measured")
    clamped: Count | None = Field(default=None, description="clamped features at this site")
    firing: Count | None = Field(default=None, description="those that fire on some prompt, without the defense")


class UtilityFigures(Section):
    """The cost of the defense on neutral text."""

    loss_off: Figure = Field(description="next-token cross-entropy without the defense, nats a token")
    loss_on: Figure = Field(description="next-token cross-entropy with the defense, nats a token")
    increase: Figure = Field(description="loss_on - loss_off, nats a token")
    tokens: Count = Field(description="number of tokens predicted")
    broken: bool = Field(description="whether the increase is above what was allowed, or not a number")


class FitFigures(Section):
    """Figures of the SAE that explains least, and of each."""

    explained_variance: Figure = Field(description="share of the residual's variance that the SAE reconstructs")
    l0: Figure = Field(description="mean number of active features a token")
    loss_recovered: Figure = Field(description="share of the loss that the SAE's reconstruction preserves")
    sites: tuple[SiteFit, ...] = Field(description="the fit at each clamped site")
    utility: UtilityFigures | None = Field(description="cost on neutral text; null where none was given")


class Counts(Section):
    """How many examples show the behavior, and when."""

    n: Count = Field(description="number of examples")
    base: Count = Field(description="examples that show the behavior without the defense")
    defended: Count = Field(description="examples that show it with the defense")
    valid_flips: Count = Field(description="examples that show it without the defense and not with it")
    strict_flips: Count = Field(description="valid flips by the stricter predicate that transfer is read with")


class Rate(Section):
    """A count of examples, with its share and interval."""

    hits: Count = Field(description="number of examples")
    rate: Annotated[float, Field(ge=0, le=1)] = Field(description="hits as a share of all")
    wilson95: tuple[float, float] = Field(description="95% Wilson interval of the rate")

    @classmethod
    def of(cls, hits: Iterable[bool]) -> Rate:
        """The rate of these; there is at least one."""
        each = list(hits)
        return cls(hits=sum(each), rate=sum(each) / len(each), wilson95=wilson(sum(each), len(each)))


class Replies(Section):
    """Free replies under the perturbations, where the behavior is a whole answer."""

    n: int = Field(ge=1, description="number of replies")
    non_refusal: Rate = Field(description="replies that open with neither a refusal nor a safety cue")
    base_like: Rate = Field(description="replies like the undefended model's answer; these count as recovered")
    strict_base_like: Rate = Field(description="replies like it by the stricter measure")
    token_for_token: Rate = Field(description="forced answers that come back token for token")
    degenerate: Rate = Field(description="replies that only repeat themselves")
    relative_drift_max: Figure = Field(description="largest drift of clamped features along a reply, share of size")
    preactivation_shift_max: Figure = Field(description="largest shift of a clamped pre-activation along a reply")


class Recovery(Section):
    """Recovery at the budget, over the valid flips, from certificates alone."""

    budget: float = Field(description="largest norm allowed")
    recovered: Count = Field(description="valid flips recovered, with the clamped features unmoved")
    back_but_features_moved: Count = Field(description="flips that show the behavior, but clamped features moved")
    searched: Count = Field(description="valid flips searched whose replay agrees that the behavior is suppressed")
    rate: Figure = Field(description="recovered as a share of searched")
    wilson95: Interval = Field(description="95% Wilson interval of the rate")
    drift_mean: Figure = Field(description="mean norm of the change of the clamped features")
    drift_max: Figure = Field(description="largest norm of the change of the clamped features")
    relative_drift_mean: Figure = Field(description="mean drift as a share of the features' norm")
    decode_drift_mean: Figure = Field(description="mean norm of what that drift writes to the residual")
    clamp_floor_violation_mean: Figure = Field(description="mean sinking of raised features, share of their norm")
    constraint_residual_max: Figure = Field(description="largest ||A^T delta|| / (||A|| ||delta||)")
    preactivation_shift_max: Figure = Field(description="largest shift of a clamped pre-activation")
    threshold_margin_median: Figure = Field(description="median of pre-activation minus threshold; below 0: inactive")
    below_threshold_share: Figure = Field(description="share of clamped features at or below their threshold")
    norm_mean: Figure = Field(description="mean norm of the perturbations")
    relative_norm_mean: Figure = Field(description="mean norm as a share of the defended residual's")
    displacement_everywhere_mean: Figure = Field(
        default=None, description="mean norm of how far the clamp moves the residual, over all positions"
    )
    clamp_displacement_mean: Figure = Field(description="mean norm of how far the clamp itself moves the residual")
    reactivated_share: Figure = Field(description="share of inactive clamped features that became active")
    zero_reactivation_recovered: Count = Field(description="recovered flips on which no clamped feature became active")
    steps_mean: Figure = Field(description="mean number of search steps")
    won_by: dict[str, Count] = Field(description="for each solver, on how many flips it found the smallest norm")
    replies: Replies | None = Field(description="what the model says; null where the behavior is no whole answer")

    @property
    def features_compete(self) -> bool:
        """The SAE's features have no fixed threshold, so that orthogonality alone does not pin the clamped ones."""
        return self.searched > 0 and self.below_threshold_share is None

    @property
    def mostly_inactive(self) -> bool:
        """Most clamped features sit below their threshold, where zero drift shows little."""
        return self.below_threshold_share is not None and self.below_threshold_share > 0.5


class MinimumNorm(Section):
    """The smallest certified norm of each valid flip; null is infinite."""

    median: Figure = Field(description="median of the smallest norms")
    quartiles: tuple[Figure, Figure] = Field(description="lower and upper quartile of the smallest norms")
    interval95: Interval = Field(description="95% interval of the median")
    median_over_displacement: Figure = Field(description="median norm as a share of the clamp's own displacement")
    median_over_residual: Figure = Field(description="median norm as a share of the defended residual's")
    unreached: Count = Field(description="flips on which no perturbation of any size was found")
    by_solver: dict[str, Figure] = Field(description="median of the smallest norms of each solver")


class CurvePoint(Section):
    """The share of valid flips whose smallest certified norm is within a budget."""

    budget: float = Field(description="largest norm allowed")
    rate: float = Field(description="share of valid flips recovered")
    wilson95: Interval = Field(description="95% Wilson interval of the rate")


class PairedNorms(Section):
    """Smallest norms of the behavior's own target against an unrelated one's, example by example."""

    n: Count = Field(description="number of pairs")
    smaller: Count = Field(description="pairs where the own target needs the smaller norm")
    larger: Count = Field(description="pairs where it needs the larger norm")
    ties: Count = Field(description="pairs that differ by less than the tolerance")
    both_infinite: Count = Field(description="ties where neither target was reached")
    median_ratio: Figure = Field(description="median of own norm over the unrelated target's")
    p: Figure = Field(description="one-sided p-value of the sign test, uncorrected")


class PlaceboControl(Section):
    """The search for an unrelated target of the same kind."""

    n: Count = Field(description="examples with an unrelated target")
    rate: Figure = Field(description="share on which the unrelated target is reached within the budget")
    own_rate: Figure = Field(description="share on which the own target is reached within the budget")
    median_norm: Figure = Field(description="median smallest norm for the unrelated target")
    own_median_norm: Figure = Field(description="median smallest norm for the own target")
    paired: PairedNorms | None = Field(description="the two norms compared example by example")

    @property
    def easily_reached(self) -> bool:
        """The unrelated target is reached more than half as often as the own one."""
        return self.rate is not None and self.own_rate is not None and self.rate > 0.5 * self.own_rate


class RandomControl(Section):
    """Random admissible directions at the budget's norm."""

    rate: Figure = Field(description="mean share of draws that recover the behavior")
    examples_reached: Count = Field(description="examples that at least one draw recovers")
    n: Count = Field(description="number of examples")


class PlaceboFeatures(Section):
    """Random features, as many and matched in firing rate, clamped in place of the defense's."""

    draws: Count = Field(description="number of random sets of features")
    suppressed_rate: Figure = Field(description="share of examples showing the behavior that these suppress")
    suppressed: Count = Field(description="number of examples suppressed, over all draws")
    rate: Figure = Field(description="share of those that a search within the budget recovers")
    interval95: tuple[Figure, Figure] | None = Field(
        default=None, description="95% interval of suppressed_rate over draws"
    )


def suppress_as_much(drawn: PlaceboFeatures, counts: Counts) -> bool:
    """Whether random features suppress at least half as many examples as those of the defense do."""
    if drawn.suppressed_rate is None or not counts.base:
        return False
    return drawn.suppressed_rate >= counts.valid_flips / counts.base / 2


class UndoScale(Section):
    """A share of the clamp's displacement taken back."""

    scale: float = Field(description="share of the admissible displacement that is taken back")
    rate: Figure = Field(description="share of flips recovered by undoing their own displacement")
    averaged_rate: Figure = Field(description="share recovered by undoing the mean displacement")
    norm_mean: Figure = Field(description="mean norm of what is added")


class UndoControl(Section):
    """The admissible part of the clamp's own displacement, taken back."""

    rate: Figure = Field(description="largest share of flips recovered at any scale")
    cosine: Figure = Field(description="mean cosine of the found perturbations with the undone displacement")
    scales: tuple[UndoScale, ...] = Field(description="the rates scale by scale")

    @property
    def empty(self) -> bool:
        """Nothing is there to take back: the clamp moves nothing admissible where a perturbation enters."""
        return bool(self.scales) and all(not scale.norm_mean for scale in self.scales)


class WriteOrthogonalControl(Section):
    """The search under C1+: orthogonal to the clamped features' decoder directions as well."""

    rate: Figure = Field(description="share of flips recovered within the budget")
    median_norm: Figure = Field(description="median smallest norm")


class RateControl(Section):
    """A control with one figure."""

    rate: Figure = Field(description="share of flips recovered")


class Controls(Section):
    """Controls of the search; null where one was not run."""

    placebo: PlaceboControl | None = Field(description="the same search for an unrelated target")
    random: RandomControl | None = Field(description="random admissible directions")
    placebo_features: PlaceboFeatures | None = Field(description="random features clamped instead")
    undo: UndoControl | None = Field(description="the clamp's own displacement taken back")
    write_orthogonal: WriteOrthogonalControl | None = Field(description="the search under C1+")
    undefended: RateControl | None = Field(description="the search with the clamp off")
    unbounded: RateControl | None = Field(description="the search without a budget")


class TransferPoint(Section):
    """Readings of shared perturbations at one norm, on unseen flips."""

    budget: float = Field(description="largest norm of the shared perturbation")
    relative_norm: Figure = Field(description="that norm as a share of the mean defended residual's norm")
    heldout_rate: Figure = Field(description="share of readings that show the right answer, under C1")
    random_rate: Figure = Field(description="share under random directions of the same norm")
    undo_rate: Figure = Field(description="share under the clamp undone, at the best scale")


class Transfer(Section):
    """Shared perturbations, each fitted on one part of the prompts and read on the flips of the other part.

    A flip is read once for each split of the prompts; what follows from the readings is under `knowledge`.
    """

    budget: Figure = Field(description="largest norm of the shared perturbation")
    relative_norm: Figure = Field(description="that norm as a share of the mean defended residual's norm")
    residual_norm: Figure = Field(description="mean norm of the defended residual")
    train_rate: Figure = Field(description="share right of the examples that it was fitted to")
    own: Reading = Field(description="the right answer, under perturbations fitted to it (C1), by certificate")
    write_orthogonal: Reading = Field(description="the same under C1+; n is 0 where C1+ admits nothing")
    shuffled: Reading = Field(description="the right answer, under perturbations fitted to answers dealt at random")
    undo_cosine: Figure = Field(description="cosine of the perturbation with the undone clamp, the largest in size")
    write_orthogonal_undo_cosine: Figure = Field(description="undo_cosine under C1+")
    back_but_features_moved: Count = Field(description="readings that show the behavior, but clamped features moved")
    preactivation_shift_max: Figure = Field(description="largest shift of a clamped pre-activation")
    constraint_residual_max: Figure = Field(description="largest ||A^T delta|| / (||A|| ||delta||)")
    curve: tuple[TransferPoint, ...] = Field(description="readings at each norm, smallest first")

    @property
    def heldout_rate(self) -> float | None:
        """Share of unseen readings that show the right answer, by certificate."""
        return self.own.rate if self.own.n else None


class RefusedTransfer(Section):
    """Transfer that could not be run."""

    refused: str = Field(description="why not")


class SaidReading(Section):
    """Free replies under one part of the perturbation."""

    non_refusal: Rate = Field(description="replies that open with neither a refusal nor a safety cue")
    base_like: Rate = Field(description="replies like the undefended model's answer")


class PartFigures(Section):
    """One part of the perturbation, over all examples; shares are of the whole perturbation's effect on the score."""

    norm_mean: Figure = Field(description="mean norm of the part")
    first_order_share: Figure = Field(description="share by the gradient at the defended state")
    integrated_share: Figure = Field(description="share by the gradient averaged along the perturbation")
    replay_share: Figure = Field(description="share when the part alone is added")
    knockout_share: Figure = Field(description="share that is left when the part is removed")
    replay: Rate = Field(description="flips that the part alone recovers")
    knockout: Rate = Field(description="flips still recovered with the part removed")
    said: SaidReading | None = Field(description="what the model says under the part alone, where that is read")


Part = Literal["full", "error", "free", "top_k", "clamped"]


class AttributionFigures(Section):
    """Which parts of the perturbations within the budget carry their effect."""

    n: int = Field(ge=1, description="number of examples")
    top_k: int = Field(ge=1, description="number of unclamped features in the part `top_k`")
    effect_mean: Figure = Field(description="mean effect of the whole perturbation on the score")
    gap: Figure = Field(description="share of the effect that the gradient at the defended state misses")
    integrated_gap: Figure = Field(description="share that the gradient averaged along the perturbation misses")
    parts: dict[Part, PartFigures] = Field(description="figures of each part, by name")


class Statistics(Section):
    """The thresholds that decisions rest on."""

    rules: Rules = Field(description="thresholds of the rules of evidence")


@with_config(STRICT)
@dataclass(frozen=True)
class Gate:
    """A condition; `passed` is None where it was not run, and `detail` then says why."""

    name: Annotated[str, Field(description="short name of the condition")]
    passed: Annotated[bool | None, Field(description="whether it holds; null where it was not run")]
    detail: Annotated[str, Field(description="the figures behind it, in words")]
    decides: Annotated[
        Literal["INVALID", "INCONCLUSIVE"] | None,
        Field(description="the verdict that a failure leads to; null where it is only a caution"),
    ] = "INCONCLUSIVE"


class Health(Section):
    """Whether gradients account for values, on a sample of the valid flips; no part of the JSON but of two gates."""

    n: Count = Field(description="number of examples sampled")
    finite_differences: Count = Field(description="examples whose gradients equal finite differences")
    error_channel: Count = Field(description="examples whose gradients do so within the SAE's error")


class PlaceboDraw(Section):
    """One set of random features clamped; all None where an SAE has too few other features."""

    suppressed: Count | None = Field(description="examples that these suppress")
    base: Count | None = Field(description="examples that show the behavior without a clamp")
    recovered: Count | None = Field(description="suppressed examples that a search within the budget recovers")


class Provenance(BaseModel):
    """Versions, seeds, device and weights behind the verdict; unknown ones are left out, and a caller may add keys."""

    model_config = ConfigDict(frozen=True, extra="allow")

    versions: dict[str, str] = Field(default={}, description="versions of the packages used")
    seed: int | None = Field(default=None, description="seed of the prompts")
    control_seed: int | None = Field(default=None, description="seed of the search, the split and the controls")
    device: str | None = Field(default=None, description="device that the model ran on")
    dtype: str | None = Field(default=None, description="number format of the searched model")
    sae_sha256: dict[str, Annotated[str, Field(pattern="^[0-9a-f]{64}$")]] = Field(
        default={}, description="SHA-256 of each SAE's weights, by name"
    )
    model: str = Field(default="", description="the model's name, source and version")
    threads: int | None = Field(default=None, description="number of threads of a worker")
    workers: int | None = Field(default=None, description="number of worker processes")
    phases: dict[str, float] = Field(default={}, description="share of the time that each phase took")
    phase_seconds: float | None = Field(default=None, description="seconds that all phases took")
    seconds: float | None = Field(default=None, description="seconds that the run took in all")


class PublishedRow(Section):
    """A published figure beside ours."""

    figure: str = Field(description="path of the figure in the verdict")
    source: str = Field(description="where it was published")
    published: float = Field(description="the figure as published")
    n: Annotated[int, Field(ge=1)] | None = Field(description="number of examples that it is a share of")
    ours: Figure = Field(description="the figure of this run; null where it was not measured")
    wilson95: tuple[float, float] | None = Field(description="95% Wilson interval of ours, where it is a rate")
    tolerance: Annotated[float, Field(ge=0)] | None = Field(description="difference that still counts as agreement")
    low: Figure = Field(description="smallest value that agrees; null where there is no bound")
    high: Figure = Field(description="largest value that agrees; null where there is no bound")
    agrees: bool | None = Field(description="whether ours agrees; null where this cannot be said")


class Verdict(Section):
    """The whole answer of a check: what `verdict.json` holds, and the records of `examples.jsonl`.

    `content` and `rule` are None where the JSON says "unknown". `records` is no part of the JSON.
    """

    schema_: Literal["recover.verdict/3"] = Field(alias="schema", description="name of this format")
    verdict: Kind = Field(description="what the check came to")
    content: Known = Field(description="whether the answers can still be read from the defended state")
    rule: Known = Field(default=None, description="whether the own rule returns more easily than other rules")
    reasons: tuple[str, ...] = Field(min_length=1, description="sentences that explain the verdict")
    threat_model: ThreatModel = Field(description="what the perturbation may do")
    fit: FitFigures = Field(description="how well the SAEs describe the model, and what the defense costs")
    counts: Counts = Field(description="how many examples show the behavior, and when")
    recovery: Recovery = Field(description="recovery at the budget")
    minimum_norm: MinimumNorm | None = Field(description="the smallest norms; null where nothing was searched")
    curve: tuple[CurvePoint, ...] = Field(description="recovery at several budgets")
    controls: Controls = Field(description="controls of the search")
    transfer: Transfer | RefusedTransfer | None = Field(description="one perturbation for all prompts")
    uses: UsesFigures | None = Field(default=None, description="what the finds use, and how that is known")
    knowledge: Knowledge | None = Field(default=None, description="what the model still knows, and how that is known")
    attribution: AttributionFigures | None = Field(description="which parts of the perturbations carry their effect")
    power: PowerFigures | None = Field(
        default=None,
        description="which planted routes the search finds; null where it found the behavior or was not asked",
    )
    statistics: Statistics = Field(description="the rules of evidence, and what they came to")
    provenance: Provenance = Field(description="code, weights, seeds and device behind the verdict")
    gates: tuple[Gate, ...] = Field(min_length=1, description="validity checks")
    published: tuple[PublishedRow, ...] = Field(
        default=(), description="published figures beside ours, where any are given"
    )
    records: SkipJsonSchema[tuple[ExampleRecord, ...]] = Field(default=(), exclude=True, repr=False)

    @property
    def shared(self) -> Transfer | None:
        """The readings of transfer; None where it was not run or could not be."""
        return self.transfer if isinstance(self.transfer, Transfer) else None

    @property
    def random_features_suppress(self) -> bool:
        """Random features suppress at least half as much as those of the defense: a caution."""
        drawn = self.controls.placebo_features
        return drawn is not None and suppress_as_much(drawn, self.counts)

    def took(self, seconds: float | None) -> Verdict:
        """The verdict with how long the whole run took."""
        return self.model_copy(update={"provenance": self.provenance.model_copy(update={"seconds": seconds})})

    def to_dict(self) -> dict[str, Any]:
        """Plain values under the keys of `verdict.json`."""
        values = self.model_dump(mode="json", by_alias=True, exclude=None if self.published else {"published"})
        return values | {"provenance": self.provenance.model_dump(mode="json", exclude_unset=True)}

    @classmethod
    def from_json(cls, text: str) -> Verdict:
        """Read what `verdict.json` holds.

        Raises:
            OtherSchemaError: it was written in another schema.
            ValueError: it is no verdict.
        """
        values = json.loads(text)
        named = values.get("schema") if isinstance(values, Mapping) else None
        if isinstance(named, str) and named != SCHEMA:
            found = re.search(r'"recover": *"([^"]{1,20})"', text)
            opener = f"recover {found[1]}, which wrote it" if found else "the version of recover that wrote it"
            raise OtherSchemaError(f"its schema is {named[:40]!r} and this one opens {SCHEMA!r}; open it with {opener}")
        return cls.model_validate_json(text)


class OtherSchemaError(ValueError):
    """A verdict in a schema that this version does not read."""
