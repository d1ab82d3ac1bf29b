"""What a perturbation may not do, as projections and measures. Read `linear` first.

============  ==============================================================================================
`linear`      C1 to C4 at one site: encoder-orthogonal, activation-stable, decode-stable, within the budget
`first_order` the linear space over several sites: C1 and the rows of a Jacobian, to first order
`pinned`      deltas at every site whose corrections keep every clamped pre-activation, exactly
`monitor`     what clamped features of all sites do under a delta, and the Jacobian of that
============  ==============================================================================================
"""

from recover.search.constraints.first_order import JacobianOrthogonal, admissible
from recover.search.constraints.linear import (
    ActivationStable,
    Budget,
    Constraint,
    Constraints,
    DecodeStable,
    EncoderOrthogonal,
)
from recover.search.constraints.monitor import Monitor
from recover.search.constraints.pinned import Pinned

__all__ = [
    "ActivationStable",
    "Budget",
    "Constraint",
    "Constraints",
    "DecodeStable",
    "EncoderOrthogonal",
    "JacobianOrthogonal",
    "Monitor",
    "Pinned",
    "admissible",
]
