"""Rule: does the behavior's own rule come back more easily than other rules over the same prompts?

A shared perturbation can carry a rule that picks an answer, such as the first name of a prompt. So the own rule is held
against others (`recover.tasks.rules`), each fitted, read and filtered in the same way: the smallest norm at which a
rule's answer shows on an unseen flip, own against other, where the two answer differently.

1. *Over prompts*: in how many clusters is the own rule clearly the easier (by more than `tie`)? A sign test. Of either
   rule the smallest norm of all draws counts.
2. *Over fits*: one lucky fit makes a rule easier on all prompts at once. The median log-ratio of norms in each draw is
   tested over draws (Student).

==================  =======  ===========================================================================================
reason              rule     where (the first that applies)
==================  =======  ===========================================================================================
`not_run`           unknown  no shared perturbation could be fitted
`no_other_rule`     unknown  no other rule answers differently on `min_heldout` clusters of flips
`high_chance`       unknown  answers dealt at random show on unseen prompts, more often than `max_chance`
`easier`            true     many flips are right again and most of what was right stays so; and against every other
                             rule the own one is easier, over prompts (`rule_alpha`) and over fits (`fit_alpha`)
`as_easy`           false    another rule holds on many unseen flips, and the own one is easier by more than `tie` on
                             less than half of them (upper bound), and over fits (`fit_alpha`)
`not_imposed`       unknown  the own rule holds on too few unseen flips
`fits_vary`         unknown  easier over prompts, but fits vary too much to say so
`undecided`         unknown  anything else
==================  =======  ===========================================================================================

`as_easy` is said only where fits are known to work: the own rule holds on many flips, or planted gates were opened.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated

import numpy as np
from pydantic import ConfigDict, Field, with_config

from recover.evidence.content import fits_work
from recover.evidence.readings import Bools, ClusterRate, Count, Floats, Other, Table
from recover.evidence.rules import Rules
from recover.numerics.statistics import mean_above_zero, sign_test, upper_share
from recover.types import Share

FARTHEST = 4.0
"""A ratio of norms counts as this much at most, which gives one to a rule that is never reached."""


class RuleReason(StrEnum):
    """Why `rule` is true, false or unknown."""

    NOT_RUN = "not_run"
    NO_OTHER_RULE = "no_other_rule"
    HIGH_CHANCE = "high_chance"
    EASIER = "easier"
    AS_EASY = "as_easy"
    NOT_IMPOSED = "not_imposed"
    FITS_VARY = "fits_vary"
    UNDECIDED = "undecided"

    @property
    def rule(self) -> bool | None:
        """True, False, or None for "unknown"."""
        return {RuleReason.EASIER: True, RuleReason.AS_EASY: False}.get(self)


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True)
class Against:
    """The own rule against another one, over unseen flips on which the two answer differently."""

    name: Annotated[str, Field(description="the other rule")]
    n: Annotated[Count, Field(description="clusters compared")]
    easier: Annotated[Count, Field(description="clusters in which the own rule needs a clearly smaller norm")]
    harder: Annotated[Count, Field(description="clusters in which it needs a clearly larger one")]
    median_ratio: Annotated[float | None, Field(description="median ratio of norms, own to other, over clusters")]
    median_norm: Annotated[float | None, Field(description="median smallest norm of the other rule; null: not reached")]
    holds: Annotated[ClusterRate, Field(description="flips on which the other rule holds at the largest norm")]
    p: Annotated[Share, Field(description="p-value that the own rule is not easier, over clusters")]
    fit_p: Annotated[Share, Field(description="p-value that the own rule is not easier, over fits")]
    easier_at_most: Annotated[Share, Field(description="upper bound of the share of clusters where it is easier")]
    as_easy_p: Annotated[Share, Field(description="p-value, over fits, that the own rule is easier by more than a tie")]


@dataclass(frozen=True)
class OwnRule:
    """What was decided of the rule: the reason, flips on which the own rule holds, and the other rules, easiest first.

    `median_norm` is the median smallest norm of the own rule; None where it is not reached.
    """

    by: RuleReason
    holds: ClusterRate | None = None
    median_norm: float | None = None
    others: tuple[Against, ...] = ()

    @property
    def nearest(self) -> Against | None:
        """The other rule that comes nearest to the own one in ease, or is easier."""
        return self.others[0] if self.others else None


def judge_rule(table: Table | None, rules: Rules) -> OwnRule:
    """Apply the rules of the table above.

    >>> judge_rule(None, Rules()).by.value
    'not_run'
    """
    if table is None:
        return OwnRule(RuleReason.NOT_RUN)
    holds, kept = table.rate(table.right, table.flips), table.rate(table.right, ~table.flips)
    others = [_against(table, other, rules) for other in table.others]
    compared = sorted((one for one in others if one.n >= rules.min_heldout), key=_ease)
    imposed = holds.interval95[0] > rules.share and (kept.rate is None or kept.rate > rules.most)
    return OwnRule(_reason(table, rules, compared, imposed), holds, _median(table, table.norms), tuple(compared))


def _reason(table: Table, rules: Rules, others: list[Against], imposed: bool) -> RuleReason:
    if not others:
        return RuleReason.NO_OTHER_RULE
    if table.dealt.n and table.dealt.rate > rules.max_chance:
        return RuleReason.HIGH_CHANCE
    over_prompts = all(one.p <= rules.rule_alpha for one in others)
    if imposed and over_prompts and all(one.fit_p <= rules.fit_alpha for one in others):
        return RuleReason.EASIER
    if (imposed or fits_work(table, rules)) and any(_as_easy(one, rules) for one in others):
        return RuleReason.AS_EASY
    if not imposed:
        return RuleReason.NOT_IMPOSED
    return RuleReason.FITS_VARY if over_prompts else RuleReason.UNDECIDED


def _as_easy(one: Against, rules: Rules) -> bool:
    return one.holds.interval95[0] > rules.share and one.easier_at_most < 0.5 and one.as_easy_p <= rules.fit_alpha


def _ease(one: Against) -> float:
    return -one.median_ratio if one.median_ratio is not None else math.inf


def _against(table: Table, other: Other, rules: Rules) -> Against:
    which = table.flips & (other.answers != table.own)
    ratios = _log_ratios(table.norms, other.norms)
    by_cluster = table.by_cluster(_log_ratios(_nearest(table.norms), _nearest(other.norms)), which)
    easier, harder = int((by_cluster < -rules.tie_log).sum()), int((by_cluster > rules.tie_log).sum())
    # To say that the own rule is no easier, it gets the best of all its fits.
    best = _log_ratios(table.best_norms, other.norms)
    nearest = table.by_cluster(_log_ratios(_nearest(table.best_norms), _nearest(other.norms)), which)
    best_easier = int((nearest < -rules.tie_log).sum())
    held = np.isfinite(other.norms)
    return Against(
        name=other.name,
        n=len(by_cluster),
        easier=easier,
        harder=harder,
        median_ratio=float(np.exp(np.median(by_cluster))) if len(by_cluster) else None,
        median_norm=_median(table, other.norms),
        holds=table.rate(held, which),
        p=sign_test(easier, harder),
        fit_p=mean_above_zero([-value for value in _by_draw(table, ratios, which)]),
        easier_at_most=upper_share(best_easier, len(by_cluster)),
        as_easy_p=mean_above_zero([value + rules.tie_log for value in _by_draw(table, best, which)]),
    )


def _log_ratios(own: Floats, other: Floats) -> Floats:
    """`log(own / other)`, within `FARTHEST`; 0 where neither is reached, and where nothing was read."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.log(own) - np.log(other)
    most = math.log(FARTHEST)
    within: Floats = np.nan_to_num(ratios, nan=0.0, posinf=most, neginf=-most).clip(-most, most)
    return within


def _nearest(norms: Floats) -> Floats:
    """The smallest norm of each example over all draws that read it."""
    smallest: Floats = np.nanmin(np.where(np.isnan(norms), np.inf, norms), axis=0)
    return smallest


def _by_draw(table: Table, ratios: Floats, which: Bools) -> list[float]:
    chosen = table.read & which
    return [float(np.median(row[here])) for row, here in zip(ratios, chosen, strict=True) if here.any()]


def _median(table: Table, norms: Floats) -> float | None:
    known = norms[table.read & table.flips]
    median = float(np.quantile(known, 0.5, method="higher")) if len(known) else math.inf
    return median if math.isfinite(median) else None
