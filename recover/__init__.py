"""With an SAE feature clamp held, can the suppressed behavior still be brought back?

The public names. Start at `search.py`; `check.py` is the whole protocol.
"""

from recover.checks.verification import Law, verify
from recover.defenses.clamps import Clamp, Defense, Floor, Mode, Scale, Set
from recover.defenses.defended import Defended, defend
from recover.defenses.selection import attributions, contrast, largest, select_features
from recover.defenses.speech import say
from recover.evidence.attribution.parts import Attribution, attribute
from recover.evidence.certificate import Certificate, certify
from recover.evidence.rules import Rules
from recover.evidence.transfer import FitSchedule, Pool, Problem, fit_shared
from recover.models.generation import answered, generate
from recover.models.host import Model, Prompts, Run, Suffix
from recover.models.names import load_model, resolve_model
from recover.numerics.statistics import wilson
from recover.numerics.subspaces import NullSpace, row_space
from recover.protocol.checking import check
from recover.protocol.ledger import InMemoryStore, Store
from recover.protocol.plan import Plan, TransferPlan
from recover.protocol.runtime import Runtime
from recover.protocol.verdict_model import Gate, Verdict
from recover.protocol.workers import LostWorkerError, Workers, joined
from recover.run.config import Config, load_config
from recover.run.runner import run_check
from recover.saes.decomposition import Decomposition, decompose, recompose
from recover.saes.fit import Fit, measure_fit
from recover.saes.names import load_sae
from recover.saes.sae import SAE, from_sae_lens, load_sae_folder
from recover.search.ascent import Objective, Schedule, Solution, Status, find_perturbation
from recover.search.constraints.linear import (
    ActivationStable,
    Budget,
    Constraint,
    Constraints,
    DecodeStable,
    EncoderOrthogonal,
)
from recover.search.constraints.pinned import Pinned
from recover.search.constraints.restored import find_restored
from recover.search.pinned import PinnedSolution, find_pinned
from recover.search.restoring import RestoredSolution
from recover.search.stable import find_stable
from recover.tasks import Task, load_examples
from recover.tasks.behaviors import (
    AnswerLikelihood,
    Behavior,
    ChoiceCrossEntropy,
    ChoiceMargin,
    ChoiceOdds,
    ForcedAnswer,
    LogitDifference,
    VocabularyMargin,
)
from recover.tasks.dialogue import Dialogue, Request, ask
from recover.tasks.examples import Contrast, Examples
from recover.types import InputError, Site, Surface

__all__ = [
    "SAE",
    "ActivationStable",
    "AnswerLikelihood",
    "Attribution",
    "Behavior",
    "Budget",
    "Certificate",
    "ChoiceCrossEntropy",
    "ChoiceMargin",
    "ChoiceOdds",
    "Clamp",
    "Config",
    "Constraint",
    "Constraints",
    "Contrast",
    "DecodeStable",
    "Decomposition",
    "Defended",
    "Defense",
    "Dialogue",
    "EncoderOrthogonal",
    "Examples",
    "Fit",
    "FitSchedule",
    "Floor",
    "ForcedAnswer",
    "Gate",
    "InMemoryStore",
    "InputError",
    "Law",
    "LogitDifference",
    "LostWorkerError",
    "Mode",
    "Model",
    "NullSpace",
    "Objective",
    "Pinned",
    "PinnedSolution",
    "Plan",
    "Pool",
    "Problem",
    "Prompts",
    "Request",
    "RestoredSolution",
    "Rules",
    "Run",
    "Runtime",
    "Scale",
    "Schedule",
    "Set",
    "Site",
    "Solution",
    "Status",
    "Store",
    "Suffix",
    "Surface",
    "Task",
    "TransferPlan",
    "Verdict",
    "VocabularyMargin",
    "Workers",
    "answered",
    "ask",
    "attribute",
    "attributions",
    "certify",
    "check",
    "contrast",
    "decompose",
    "defend",
    "find_perturbation",
    "find_pinned",
    "find_restored",
    "find_stable",
    "fit_shared",
    "from_sae_lens",
    "generate",
    "joined",
    "largest",
    "load_config",
    "load_examples",
    "load_model",
    "load_sae",
    "load_sae_folder",
    "measure_fit",
    "recompose",
    "resolve_model",
    "row_space",
    "run_check",
    "say",
    "select_features",
    "verify",
    "wilson",
]
