"""Rules of evidence: when may a recovery be called specific to the behavior?

That a delta brings an answer back under the clamp shows little, as a delta may be able to write any answer. Two kinds
of evidence count, and neither rule looks at which task, model or defense it is judging:

- *transfer*: one shared delta, read on examples it was not fitted to, against the same fit to shuffled targets and
  against random directions of the same norm; under C1, and under C1+, where it cannot be the clamp undone;
- *placebo*: whether the behavior's own target needs a smaller perturbation than an unrelated target of the same kind.

`specific`  where
==========  ============================================================================================================
true        transfer recovers most held-out examples (Wilson lower bound above `most`) and more than shuffled targets do
            (Fisher, p at most `alpha`), under C1 and under C1+; and chance is at most `max_chance`
false       transfer recovers no more than shuffled targets do, under C1, and the own target is not easier than the
            placebo (sign test, p above `alpha`): a perturbation of this size writes answers; not where the held-out
            examples are so few that a rate of less than `most` may be one of more (Wilson upper bound)
false       transfer recovers more than shuffled targets do under C1 but not under C1+: the clamp was undone
false       all examples are asked for one target, and another one is brought about as often on unseen examples by a
            delta that is fitted to it (Fisher, p above `alpha`), or on most of them (Wilson, as above): a linear probe
            at the clamped site can always be written, whatever the model still knows
unknown     anything else, with the reason; also where a part of this was not run, or on fewer than `min_heldout`
            examples
==========  ============================================================================================================

*Chance* is how often the predicate holds where it has no reason to: of the right answer under random directions, or of
an answer dealt to an unseen example at random, under deltas fitted to such answers; the larger of the two. That the
*right* answer comes back under a delta fitted to wrong ones is no chance: a delta may reopen a mechanism on its way to
something else. It is what transfer must exceed.

P-values are corrected for the comparisons made (Holm), whose number is stated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import PositiveInt

from recover.numerics.statistics import Paired, holm, more_often, wilson
from recover.types import Share

__all__ = ["Finding", "Reading", "Rules", "TransferEvidence", "judge"]


@dataclass(frozen=True)
class Rules:
    """Thresholds, each a default that can be configured (`rules:` in DEFENSE.yaml).

    Args:
        alpha: p-value, after correction, up to which a difference counts.
        most: share that the lower end of a held-out rate's 95 % interval must exceed.
        max_chance: largest rate of chance at which a predicate can show anything.
        min_heldout: fewest held-out examples that can show anything.
        min_pairs: fewest pairs of own and placebo target that can show anything; more are asked where `alpha` cannot be
            reached by so few.
    """

    alpha: Share = 0.01
    most: Share = 0.5
    max_chance: Share = 0.25
    min_heldout: PositiveInt = 8
    min_pairs: PositiveInt = 5


@dataclass(frozen=True)
class Reading:
    """How many of so many readings show the behavior."""

    hits: int
    n: int

    @property
    def rate(self) -> float:
        """NaN where nothing was read."""
        return self.hits / self.n if self.n else math.nan


@dataclass(frozen=True)
class TransferEvidence:
    """Readings at the transfer budget, on held-out examples: of shared deltas under C1, under C1+, and of controls.

    Attributes:
        own, write_orthogonal: the right answer, under deltas fitted to right answers. Under C1+ nothing is read (n is
            0) where it admits nothing.
        shuffled: the right answer, under deltas fitted to shuffled ones.
        dealt: an answer dealt at random, under the same.
        random: the right answer, under random directions.
        one_for_all: all examples are asked for the same target, and `dealt` is another one for all of them.
    """

    own: Reading
    write_orthogonal: Reading
    shuffled: Reading
    dealt: Reading
    random: Reading
    one_for_all: bool = False

    @property
    def chance(self) -> float:
        """The larger of the rates at which the predicate holds without a reason."""
        return max(self.dealt.rate, self.random.rate)


@dataclass(frozen=True)
class Finding:
    """What may be said, why, and after how many comparisons.

    Attributes:
        specific: None is "unknown".
        reasons: in words.
        comparisons: by name, the corrected p-values.
    """

    specific: bool | None
    reasons: tuple[str, ...]
    comparisons: Mapping[str, float]


def judge(
    transfer: TransferEvidence | None,
    placebo: Paired | None,
    rules: Rules,
    missing: str = "it was not run",
    within: tuple[Reading, Reading] | None = None,
) -> Finding:
    """Apply the rules.

    Args:
        transfer: None where it could not be run.
        placebo: smallest norms of the own target against the placebo's; None where there is none.
        rules: the thresholds.
        missing: why transfer could not be run.
        within: of how many examples with a placebo the own target is reached within the budget, and the placebo's. No
            rule asks for it, as what an ample budget reaches says little; it is told.
    """
    tests: dict[str, float] = {}
    if transfer is not None and transfer.shuffled.n:
        for name, reading in (("transfer", transfer.own), ("write_orthogonal_transfer", transfer.write_orthogonal)):
            if not reading.n and name != "transfer":
                continue
            tests[name] = more_often(reading.hits, reading.n, transfer.shuffled.hits, transfer.shuffled.n)
    if transfer is not None and transfer.one_for_all and transfer.dealt.n:
        own, dealt = transfer.own, transfer.dealt
        tests["transfer_over_dealt"] = more_often(own.hits, own.n, dealt.hits, dealt.n)
    if placebo is not None:
        tests["placebo"] = placebo.p
    if within is not None:
        own, other = within
        tests["placebo_rate"] = more_often(own.hits, own.n, other.hits, other.n)
    corrected = dict(zip(tests, holm(list(tests.values())), strict=True)) if tests else {}
    paired = _placebo_in_words(placebo, within, corrected, rules)
    if transfer is None:
        return Finding(None, (f"whether it is specific is unknown: transfer: {missing}", *paired), corrected)
    specific, why = _judged(transfer, placebo, rules, corrected)
    return Finding(specific, (_transfer_in_words(transfer), *paired, why), corrected)


def _judged(
    transfer: TransferEvidence, placebo: Paired | None, rules: Rules, p: Mapping[str, float]
) -> tuple[bool | None, str]:
    own, plus, chance = transfer.own, transfer.write_orthogonal, transfer.chance
    if own.n < rules.min_heldout:
        return None, f"unknown: only {own.n} held-out examples, and {rules.min_heldout} are asked; give more prompts"
    if not transfer.shuffled.n:
        return None, "unknown: the behavior names no target that could be shuffled, so that chance is not measured"
    if transfer.one_for_all and transfer.dealt.n:
        dealt = transfer.dealt
        written = f"one perturbation fitted to another target brings that about on {dealt.hits} of {dealt.n} unseen"
        if p["transfer_over_dealt"] > rules.alpha or wilson(dealt.hits, dealt.n)[0] > rules.most:
            return False, (
                f"not specific: all examples are asked for the same, which one shared perturbation can carry, and "
                f"{written}: it writes whatever it is fitted to"
            )
        return None, (
            "unknown: all examples are asked for the same, which one shared perturbation can carry, though "
            f"{written} only"
        )
    above, above_plus = p["transfer"] <= rules.alpha, p.get("write_orthogonal_transfer", 1.0) <= rules.alpha
    if above and not plus.n:
        return None, (
            "unknown: one shared perturbation does more than chance, but the directions that the clamped features "
            "read and write along leave none to C1+, so that whether it undoes the clamp cannot be told; clamp fewer"
        )
    if above and not above_plus:
        return False, (
            "not specific: what one shared perturbation brings back is gone once it must keep out of the directions "
            "that the clamp writes along (C1+): it undoes the clamp"
        )
    if not above and not above_plus:
        if placebo is None:
            return None, "unknown: one shared perturbation does no more than chance, and there is no placebo to compare"
        # Where even pairs that all agree would not pass, none of them passing shows nothing.
        if placebo.n < rules.min_pairs or 0.5**placebo.n * len(p) > rules.alpha:
            return None, (
                "unknown: one shared perturbation does no more than chance, and pairs of own and placebo target are "
                f"too few to compare ({placebo.n})"
            )
        if own.rate <= rules.most < (high := wilson(own.hits, own.n)[1]):
            return None, (
                f"unknown: one shared perturbation does no more than chance on {own.n} held-out examples, which are "
                f"too few to tell that from bringing back most (95% interval up to {high:.0%}); give more prompts"
            )
        if p["placebo"] <= rules.alpha:
            return None, (
                "unknown: one shared perturbation does no more than chance, yet the own target is nearer than the "
                "placebo's"
            )
        return False, (
            "not specific: one shared perturbation does no more than chance, and an unrelated target is reached as "
            "easily: a perturbation of this size can write answers"
        )
    if chance > rules.max_chance:
        return None, (
            f"unknown: chance satisfies this predicate {chance:.0%} of the time, and more than {rules.max_chance:.0%} "
            "can show nothing; read it with a stricter one"
        )
    lows = [wilson(reading.hits, reading.n)[0] for reading in (own, plus)]
    if min(lows) > rules.most:
        return True, (
            "specific: one shared perturbation cannot carry each prompt's answer, so the mechanism survived the clamp; "
            "it is not the clamp undone, as it holds under C1+ too"
        )
    return None, (
        f"unknown: more than chance, yet not clearly most of the held-out examples (95% intervals begin at "
        f"{lows[0]:.0%} under C1 and {lows[1]:.0%} under C1+; above {rules.most:.0%} is asked): a part of the "
        "mechanism survived, or it did for some prompts"
    )


def _transfer_in_words(transfer: TransferEvidence) -> str:
    def told(reading: Reading) -> str:
        return f"{reading.hits} of {reading.n} ({reading.rate:.0%})" if reading.n else "not measured"

    return (
        f"one perturbation shared by all prompts, fitted on some, brings back {told(transfer.own)} of the others; "
        f"orthogonal to what the clamp writes as well (C1+) {told(transfer.write_orthogonal)}; fitted to shuffled "
        f"targets {told(transfer.shuffled)}; random directions {told(transfer.random)}"
    )


def _placebo_in_words(
    placebo: Paired | None, within: tuple[Reading, Reading] | None, p: Mapping[str, float], rules: Rules
) -> tuple[str, ...]:
    told = []
    if within is not None and within[0].n and within[1].n:
        own, other = within
        specific = p["placebo_rate"] <= rules.alpha
        told.append(
            f"per example and at this budget, the own target is reached on {own.hits} of {own.n} and an unrelated one "
            f"on {other.hits} of {other.n}, so per-example recovery at this budget is {'' if specific else 'not '}"
            "specific to the behavior"
        )
    if placebo is not None and placebo.n:
        ratio = "" if math.isnan(placebo.median_ratio) else f", a median {placebo.median_ratio:.2g} times its norm away"
        told.append(
            f"the own target is nearer than the unrelated one on {placebo.smaller} of {placebo.n} pairs and farther on "
            f"{placebo.larger}{ratio} (p = {p['placebo']:.2g})"
        )
    return tuple(told)
