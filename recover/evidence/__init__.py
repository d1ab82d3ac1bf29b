"""Evidence: what found perturbations do, measured afresh, and what may be concluded from it.

Read `certificate` first: it replays saved perturbations without any code of the search. `controls` are what a
recovery is compared with, `transfer` fits one perturbation for many prompts, `rules` decide whether a recovery is
specific, and `attribution` says which parts of a perturbation and of the model carry its effect.
"""

from recover.evidence.certificate import Certificate, certify, constraint_residual, free_drift
from recover.evidence.controls import Anywhere, averaged, cosine, displacement, undone
from recover.evidence.rules import Reading, Rules
from recover.evidence.shared import fit_and_read
from recover.evidence.transfer import FitSchedule, Pool, Problem, fit_shared, halves

__all__ = [
    "Anywhere",
    "Certificate",
    "FitSchedule",
    "Pool",
    "Problem",
    "Reading",
    "Rules",
    "averaged",
    "certify",
    "constraint_residual",
    "cosine",
    "displacement",
    "fit_and_read",
    "fit_shared",
    "free_drift",
    "halves",
    "undone",
]
