"""Sentences on what the model still knows, written from what was decided; no sentence decides anything."""

from __future__ import annotations

from recover.evidence.content import ContentReason
from recover.evidence.own_rule import Against, RuleReason
from recover.evidence.readings import ClusterRate
from recover.evidence.rules import Rules
from recover.numerics.formats import interval, number, p_value, percent
from recover.protocol.knowledge_model import ContentFigures, Knowledge, RuleFigures

KNOWN = {True: "true", False: "false", None: "unknown"}


def shared(known: Knowledge, _: Rules) -> str:
    """What shared perturbations bring back on prompts that they were not fitted to."""
    back, kept = known.content.back, known.content.kept
    words = (
        f"perturbations of norm {number(known.norm)} ({percent(known.relative_norm)} of the residual norm), each "
        f"shared by all prompts and fitted to some of them ({known.fits} fits), bring the right answer back on "
        f"{clustered(back)} unseen flips"
    )
    if kept is not None and kept.n:
        words += f", and keep it on {clustered(kept)} prompts that are right under the defense"
    if known.dealt.n:
        words += f"; fitted to answers dealt at random, the dealt answer shows on {percent(known.dealt.rate, 1)}"
    return words


def content(known: Knowledge, rules: Rules) -> str:
    """Whether the answers can still be read, and why."""
    found = known.content
    return f"content {KNOWN[found.by.content]}: {_content(found, known, rules)}"


def rule(known: Knowledge, rules: Rules) -> str:
    """Whether the own rule comes back more easily than others, and why."""
    found = known.rule
    return f"rule {KNOWN[found.by.rule]}: {_rule(found, known, rules)}"


def _content(found: ContentFigures, known: Knowledge, rules: Rules) -> str:
    share = percent(rules.share)
    return {
        ContentReason.NOT_RUN: "no shared perturbation could be fitted",
        ContentReason.FEW_UNSEEN: f"only {_n(found.back)} unseen flips that do not ask the same thing were read, and "
        f"{rules.min_heldout} are needed; add prompts",
        ContentReason.ONE_ANSWER: "all prompts have the same right answer, which one shared perturbation can carry",
        ContentReason.HIGH_CHANCE: "answers dealt at random show on unseen prompts "
        f"{percent(known.dealt.rate)} of the time, and above {percent(rules.max_chance)} an answer that shows is no "
        "evidence; use a stricter predicate",
        ContentReason.KEPT_BROKEN: "what brings the flips back breaks what was right under the defense (right "
        f"again: {clustered(found.back)}; still right: {clustered(found.kept)}): it may write what flips share",
        ContentReason.A_SIMPLER_RULE: f"it is not clearly more often right than {_baseline(found)}, which needs to "
        "know no prompt's answer",
        ContentReason.A_CORRELATE: f"{found.misled} prompts show the same wrong answer under every fit, so that "
        f"something that goes with the answer {percent(rules.correlate)} of the time may be what is read "
        f"(p = {_p(found.misled_p)})",
        ContentReason.SOME_PROMPTS: f"many flips are right again, but of one kind of prompt ({_worst(found)}) fewer "
        f"than {share}",
        ContentReason.READ: "one shared perturbation cannot carry each prompt's answer, so what the answers are made "
        "of can still be read from the defended state by something that was never told them; one answer for all "
        f"prompts does not explain it ({_baseline(found)})",
        ContentReason.ERASED: f"at most {percent(found.beyond)} of unseen flips are right again beyond one answer for "
        "all prompts, while the same fits open gates that were planted into the model "
        f"({_planted(known)}): no shared perturbation up to this norm reads the answers",
        ContentReason.FIT_FAILED: "few unseen flips are right again, but the same fits did not open gates that were "
        f"planted into the model either ({_planted(known)}), so that their failure shows nothing",
        ContentReason.IN_PART: f"{clustered(found.back)} unseen flips are right again, neither clearly many (above "
        f"{share}) nor clearly none (at most {percent(rules.trace)} beyond one answer for all)",
    }[found.by]


def _rule(found: RuleFigures, known: Knowledge, rules: Rules) -> str:
    nearest = found.others[0] if found.others else None
    easiest = next((one for one in found.others if one.holds.interval95[0] > rules.share), nearest)
    beside = "" if nearest is None else _against(nearest, found)
    return {
        RuleReason.NOT_RUN: "no shared perturbation could be fitted",
        RuleReason.NO_OTHER_RULE: "no other rule over these prompts was compared on enough of them",
        RuleReason.HIGH_CHANCE: "answers dealt at random show on unseen prompts "
        f"{percent(known.dealt.rate)} of the time",
        RuleReason.EASIER: "the behavior's own rule comes back at smaller norms than every other rule that was fitted "
        f"({', '.join(one.name for one in found.others)}); the nearest is {beside}",
        RuleReason.AS_EASY: "a shared perturbation imposes another rule at least as easily as the behavior's own: "
        f"{'' if easiest is None else _against(easiest, found)}; which rule picks the answer comes from the "
        "perturbation, for all that is shown",
        RuleReason.NOT_IMPOSED: f"the own rule holds on {clustered(found.holds)} unseen flips, not clearly many",
        RuleReason.FITS_VARY: f"the own rule is easier on most prompts, but its fits vary too much to say so: {beside}",
        RuleReason.UNDECIDED: f"neither clearly easier than other rules nor clearly as hard: {beside}",
    }[found.by]


def _against(one: Against, found: RuleFigures) -> str:
    own = "not reached" if found.median_norm is None else number(found.median_norm)
    other = "not reached" if one.median_norm is None else number(one.median_norm)
    return (
        f"{one.name} (it holds on {clustered(one.holds)} unseen flips; median norm {other}, own rule {own}; the own "
        f"rule is easier on {one.easier} of {one.n} and harder on {one.harder}, p = {p_value(one.p)} over prompts and "
        f"{p_value(one.fit_p)} over fits)"
    )


def clustered(rate: ClusterRate | None) -> str:
    """A rate over clusters of prompts, with its interval."""
    if rate is None or rate.rate is None:
        return "none of"
    return f"{percent(rate.rate)} of {rate.n} ({interval(rate.interval95)})"


def _n(rate: ClusterRate | None) -> int:
    return 0 if rate is None else rate.n


def _p(p: float | None) -> str:
    return "unknown" if p is None else p_value(p)


def _baseline(found: ContentFigures) -> str:
    return "a simpler rule" if found.baseline is None else f"{found.baseline.name}, p = {_p(found.baseline.p)}"


def _worst(found: ContentFigures) -> str:
    return "" if found.worst is None else f"{found.worst.name}: {clustered(found.worst.back)}"


def _planted(known: Knowledge) -> str:
    return "none was tried" if known.planted is None else f"{known.planted.hits} of {known.planted.n}"
