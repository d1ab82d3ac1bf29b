"""With an SAE feature clamp held, can the suppressed behavior still be brought back?

The public names. Start at `search.py`; `check.py` is the whole protocol.
"""

from recover.attribution import Attribution, attribute
from recover.behavior import (
    AnswerLikelihood,
    Behavior,
    ChoiceCrossEntropy,
    ChoiceMargin,
    ChoiceOdds,
    ForcedAnswer,
    LogitDifference,
    VocabularyMargin,
)
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
from recover.dialogue import Dialogue, Request, ask
from recover.evidence import Rules
from recover.examples import Contrast, Examples
from recover.fit import Fit, measure_fit
from recover.gates import Gate
from recover.generate import answered, generate
from recover.held_search import RestoredSolution
from recover.model import Model, Prompts, Run, Suffix
from recover.pinned_search import PinnedSolution, recover_pinned
from recover.pinning import Pinned
from recover.plan import Plan, TransferPlan
from recover.restoration import recover_restored
from recover.runner import run_check
from recover.sae import SAE, from_sae_lens, load_sae_folder
from recover.search import Objective, Schedule, Solution, Status, recover
from recover.selection import attribution, contrast, largest
from recover.speech import say
from recover.stable import recover_stable
from recover.stats import bootstrap, wilson
from recover.subspace import NullSpace, row_space
from recover.tasks import Task, ask_task
from recover.transfer import FitSchedule, Pool, Problem, fit_shared
from recover.types import InputError, Site
from recover.verdict import Verdict
from recover.verify import Law, verify
from recover.workers import LostWorkerError, Workers, joined
from recover.zoo import resolve_model, resolve_sae

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
    "InputError",
    "Law",
    "LogitDifference",
    "LostWorkerError",
    "Memory",
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
    "Scale",
    "Schedule",
    "Set",
    "Site",
    "Solution",
    "Status",
    "Store",
    "Suffix",
    "Task",
    "TransferPlan",
    "Verdict",
    "VocabularyMargin",
    "Workers",
    "answered",
    "ask",
    "ask_task",
    "attribute",
    "attribution",
    "bootstrap",
    "certify",
    "check",
    "contrast",
    "decompose",
    "defend",
    "fit_shared",
    "from_sae_lens",
    "generate",
    "joined",
    "largest",
    "load_config",
    "load_sae_folder",
    "measure_fit",
    "recompose",
    "recover",
    "recover_pinned",
    "recover_restored",
    "recover_stable",
    "resolve_model",
    "resolve_sae",
    "row_space",
    "run_check",
    "say",
    "verify",
    "wilson",
]
