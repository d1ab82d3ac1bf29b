"""With an SAE feature clamp held, can the suppressed behavior still be brought back?

The public names. Start at `search.py`; `check.py` is the whole protocol.
"""

from recover.behavior import AnswerLikelihood, Behavior, ChoiceMargin, LogitDifference
from recover.certify import Certificate, certify
from recover.check import Memory, Store, check
from recover.clamp import Clamp, Defense, Floor, Mode, Scale, Set
from recover.config import Config, load_config
from recover.constraint import (
    ActivationStable,
    Budget,
    Constraint,
    Constraints,
    DecodeStable,
    EncoderOrthogonal,
)
from recover.decompose import Decomposition, decompose, recompose
from recover.defended import Defended, defend
from recover.examples import Examples
from recover.fit import Fit, measure_fit
from recover.gates import Gate
from recover.model import Model, Prompts, Run, Suffix
from recover.runner import run_check
from recover.sae import SAE, from_sae_lens, load_sae_folder
from recover.search import Objective, Schedule, Solution, Status, recover
from recover.selection import attribution, largest
from recover.stable import recover_stable
from recover.stats import bootstrap, wilson
from recover.subspace import NullSpace, row_space
from recover.types import InputError, Site
from recover.verdict import Verdict
from recover.zoo import resolve_model, resolve_sae

__all__ = [
    "SAE",
    "ActivationStable",
    "AnswerLikelihood",
    "Behavior",
    "Budget",
    "Certificate",
    "ChoiceMargin",
    "Clamp",
    "Config",
    "Constraint",
    "Constraints",
    "DecodeStable",
    "Decomposition",
    "Defended",
    "Defense",
    "EncoderOrthogonal",
    "Examples",
    "Fit",
    "Floor",
    "Gate",
    "InputError",
    "LogitDifference",
    "Memory",
    "Mode",
    "Model",
    "NullSpace",
    "Objective",
    "Prompts",
    "Run",
    "Scale",
    "Schedule",
    "Set",
    "Site",
    "Solution",
    "Status",
    "Store",
    "Suffix",
    "Verdict",
    "attribution",
    "bootstrap",
    "certify",
    "check",
    "decompose",
    "defend",
    "from_sae_lens",
    "largest",
    "load_config",
    "load_sae_folder",
    "measure_fit",
    "recompose",
    "recover",
    "recover_stable",
    "resolve_model",
    "resolve_sae",
    "row_space",
    "run_check",
    "wilson",
]
