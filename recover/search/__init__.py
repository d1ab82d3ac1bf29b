"""To be described."""

from recover.search.adam import climb
from recover.search.ascent import Feasible, scale_to
from recover.search.constraints.restored import find_linearized
from recover.search.solvers import SOLVERS, worst_case

__all__ = ["SOLVERS", "Feasible", "climb", "find_linearized", "scale_to", "worst_case"]
