"""To be described."""

from recover.evidence.attribution.carried import carried
from recover.evidence.attribution.linear_error import LinearError, error_activations, fit_linear_error
from recover.evidence.attribution.movers import name_movers
from recover.evidence.attribution.parts import POINTS, TOP_K, VIEWS, attribute, entering
from recover.evidence.controls import Anywhere
from recover.evidence.transfer import FitSchedule, Problem

__all__ = [
    "POINTS",
    "TOP_K",
    "VIEWS",
    "Anywhere",
    "FitSchedule",
    "LinearError",
    "Problem",
    "attribute",
    "carried",
    "entering",
    "error_activations",
    "fit_linear_error",
    "name_movers",
]
