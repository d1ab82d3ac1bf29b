"""Evidence: what found perturbations do, measured afresh, and what may be concluded from it.

Read `certificate` first: it replays saved perturbations without any code of the search. `controls` are what a
recovery is compared with, `transfer` fits one perturbation for many prompts, and `readings` is the table of what these
bring back. From it `content` and `own_rule` decide what the model still knows, by the thresholds in `rules`;
`attribution` says which parts of a perturbation and of the model carry its effect.
"""

from recover.evidence.certificate import Certificate, certify, constraint_residual, free_drift
from recover.evidence.content import Content, ContentReason, judge_content
from recover.evidence.controls import Anywhere, Undefended, averaged, cosine, displacement, placebo_targets, undone
from recover.evidence.own_rule import OwnRule, RuleReason, judge_rule
from recover.evidence.readings import Other, Reading, Table
from recover.evidence.rules import Rules
from recover.evidence.shared import fit_and_read
from recover.evidence.transfer import FitSchedule, Pool, Problem, derangement, fit_shared, halves, random_shared

__all__ = [
    "Anywhere",
    "Certificate",
    "Content",
    "ContentReason",
    "FitSchedule",
    "Other",
    "OwnRule",
    "Pool",
    "Problem",
    "Reading",
    "RuleReason",
    "Rules",
    "Table",
    "Undefended",
    "averaged",
    "certify",
    "constraint_residual",
    "cosine",
    "derangement",
    "displacement",
    "fit_and_read",
    "fit_shared",
    "free_drift",
    "halves",
    "judge_content",
    "judge_rule",
    "placebo_targets",
    "random_shared",
    "undone",
]
