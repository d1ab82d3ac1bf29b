"""Evidence: what found perturbations do, measured afresh, and what may be concluded from it.

Read `certificate` first: it replays saved perturbations without any code of the search. `controls` are what a
recovery is compared with, `transfer` fits one perturbation for many prompts, `rules` decide what they show about
the model, and `attribution` says which parts of a perturbation and of the model carry its effect.
"""

from recover.evidence.certificate import Certificate, certify, constraint_residual, free_drift
from recover.evidence.controls import Anywhere, Undefended, averaged, cosine, displacement, placebo_targets, undone
from recover.evidence.rules import Finding, Reading, Rules, TransferEvidence, judge
from recover.evidence.shared import fit_and_read
from recover.evidence.transfer import FitSchedule, Pool, Problem, derangement, fit_shared, halves, random_shared

__all__ = [
    "Anywhere",
    "Certificate",
    "Finding",
    "FitSchedule",
    "Pool",
    "Problem",
    "Reading",
    "Rules",
    "TransferEvidence",
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
    "judge",
    "placebo_targets",
    "random_shared",
    "undone",
]
