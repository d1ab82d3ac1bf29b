"""Searches for perturbations that bring a behavior back inside the constraints. Read `ascent` first.

=================  =========================================================================================
`ascent`           the ascent that all searches share, steepest ascent, and `find_perturbation`
`adam`             projected Adam, another rule to step by
`constraints`      what a perturbation may not do, as projections and measures
`pinned`           a delta at every clamped site under which no clamped pre-activation moves: `find_pinned`
`restoring`        the search whose points are restored before they are judged
`restored`         a delta at the first site, with the features of all sites restored: `find_restored`
`stable`           C2 and C3 themselves, in place of the sufficient C1: `find_stable`
`minimum`          the smallest norm that brings the behavior back: `smallest_perturbation`
`solvers`          several solvers that differ in kind, and the best over them: `worst_case`
`gradient_free`    a second opinion without gradients on what was not solved: `reexamined`
`gradient_checks`  whether gradients are the derivatives of what is climbed: `finite_differences`
=================  =========================================================================================
"""

from recover.search.adam import ProjectedAdam
from recover.search.ascent import Feasible, Objective, Schedule, Solution, Status, StepRule, find_perturbation, scale_to
from recover.search.constraints.first_order import JacobianOrthogonal, admissible
from recover.search.constraints.linear import (
    ActivationStable,
    Budget,
    Constraint,
    Constraints,
    DecodeStable,
    EncoderOrthogonal,
)
from recover.search.constraints.pinned import Pinned
from recover.search.gradient_checks import Agreement, error_channel, finite_differences
from recover.search.gradient_free import Effort, reexamined
from recover.search.minimum import Minimum, smallest_perturbation
from recover.search.pinned import PinnedSolution, find_pinned, shorten
from recover.search.restored import find_linearized, find_restored
from recover.search.restoring import RestoredSolution
from recover.search.solvers import SOLVERS, Found, Solver, WorstCase, random_draws, worst_case
from recover.search.stable import find_stable

__all__ = [
    "SOLVERS",
    "ActivationStable",
    "Agreement",
    "Budget",
    "Constraint",
    "Constraints",
    "DecodeStable",
    "Effort",
    "EncoderOrthogonal",
    "Feasible",
    "Found",
    "JacobianOrthogonal",
    "Minimum",
    "Objective",
    "Pinned",
    "PinnedSolution",
    "ProjectedAdam",
    "RestoredSolution",
    "Schedule",
    "Solution",
    "Solver",
    "Status",
    "StepRule",
    "WorstCase",
    "admissible",
    "error_channel",
    "find_linearized",
    "find_perturbation",
    "find_pinned",
    "find_restored",
    "find_stable",
    "finite_differences",
    "random_draws",
    "reexamined",
    "scale_to",
    "shorten",
    "smallest_perturbation",
    "worst_case",
]
