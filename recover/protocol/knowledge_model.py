"""The section `knowledge` of a verdict: what the model still knows, in two statements with evidence of their own."""

from __future__ import annotations

from pydantic import Field

from recover.evidence.content import Content, ContentReason
from recover.evidence.own_rule import Against, OwnRule, RuleReason
from recover.evidence.readings import ClusterRate, Count, Reading, Table
from recover.protocol.section import Figure, Section


class Baseline(Section):
    """A simpler rule that may explain what comes back."""

    name: str = Field(description="the rule")
    p: Figure = Field(description="p-value that it explains all that is right")


class Kind(Section):
    """The kind of prompt whose flips come back least."""

    name: str = Field(description="which prompts")
    back: ClusterRate = Field(description="flips of it that are right again")


class ContentFigures(Section):
    """Whether what the answers are made of can be read from the defended state."""

    by: ContentReason = Field(description="the reason that decided `content`")
    back: ClusterRate | None = Field(description="unseen flips that are right again")
    kept: ClusterRate | None = Field(description="of what was right under the defense, what still is")
    baseline: Baseline | None = Field(description="the simpler rule that explains most of it")
    misled: Count | None = Field(description="clusters that show the same wrong answer under every fit")
    misled_p: Figure = Field(description="p-value that as few come from a correlate of the answer")
    beyond: Figure = Field(description="upper bound of the share right again beyond one answer for all")
    worst: Kind | None = Field(description="the kind of prompt that comes back least")


class RuleFigures(Section):
    """Whether the behavior's own rule comes back more easily than others over the same prompts."""

    by: RuleReason = Field(description="the reason that decided `rule`")
    holds: ClusterRate | None = Field(description="unseen flips on which the own rule holds at the largest norm")
    median_norm: Figure = Field(description="median smallest norm of the own rule; null where it is not reached")
    others: tuple[Against, ...] = Field(description="the own rule against each other one, the easiest first")


class Knowledge(Section):
    """What shared perturbations, fitted to some prompts and read on others, show about what the model still knows."""

    norm: Figure = Field(description="the largest norm of the shared perturbations, at which evidence is read")
    relative_norm: Figure = Field(description="that norm as a share of the mean defended residual's")
    fits: Count = Field(description="fits of each kind, each on another part of the prompts")
    prompts: Count = Field(description="prompts that are right without the defense")
    clusters: Count = Field(description="groups of these that ask the same thing")
    trained: Figure = Field(description="share right among what the own fits were fitted to, mean over fits")
    dealt: Reading = Field(description="answers dealt at random that show, under fits to such answers")
    planted: Reading | None = Field(description="planted gates that the fits opened; null where none was needed")
    content: ContentFigures = Field(description="whether the answers can still be read from the defended state")
    rule: RuleFigures = Field(description="whether the own rule comes back more easily than others")


def knowledge(table: Table, norm: float, residual_norm: float, content: Content, rule: OwnRule) -> Knowledge:
    """Write down what was decided, and from what."""
    return Knowledge(
        norm=norm,
        relative_norm=norm / residual_norm,
        fits=len(table.shown),
        prompts=len(table.own),
        clusters=len(set(table.clusters.tolist())),
        trained=sum(table.trained) / len(table.trained),
        dealt=table.dealt,
        planted=table.planted,
        content=ContentFigures(
            by=content.by,
            back=content.back,
            kept=content.kept,
            baseline=None if content.baseline is None else Baseline(name=content.baseline[0], p=content.baseline[1]),
            misled=content.misled,
            misled_p=content.misled_p,
            beyond=content.beyond,
            worst=None if content.worst is None else Kind(name=content.worst[0], back=content.worst[1]),
        ),
        rule=RuleFigures(by=rule.by, holds=rule.holds, median_norm=rule.median_norm, others=rule.others),
    )
