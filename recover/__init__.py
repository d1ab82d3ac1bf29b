"""With an SAE feature clamp held, can the suppressed behavior still be brought back?

    import recover as rc

1. *Material*. `load_model` and `load_sae` load by name, `load_examples` asks a task, `select_features`
   chooses features.
2. *Defense*. `Clamp`s make a `Defense`; `defend` puts it into a model on some prompts.
3. *Search*. `find_perturbation` stays within a budget, `smallest_perturbation` needs none; `certify` measures what was
   found afresh; `fit_shared` fits one perturbation to many prompts.
4. *Protocol*. `check` does all of it, with every control, on objects, and `run_check` on a DEFENSE.yaml; both give a
   `Verdict`. `load_run` opens a finished run.

These names suffice for most analyses; the folders have the rest, each with a page in the reference. Begin to read at
`search/ascent.py`; `protocol/checking.py` is the whole protocol.
"""

from recover.defenses import Clamp, Defended, Defense, Floor, Scale, Set, defend, select_features
from recover.evidence import Certificate, Pool, Problem, certify, fit_shared
from recover.models import Model, Prompts, load_model
from recover.protocol import Plan, Runtime, Verdict, check
from recover.run import load_config, load_run, run_check
from recover.saes import SAE, load_sae
from recover.search import EncoderOrthogonal, Schedule, Solution, find_perturbation, smallest_perturbation
from recover.tasks import Behavior, Examples, LogitDifference, load_examples
from recover.types import InputError, Site, Surface

__all__ = [
    "SAE",
    "Behavior",
    "Certificate",
    "Clamp",
    "Defended",
    "Defense",
    "EncoderOrthogonal",
    "Examples",
    "Floor",
    "InputError",
    "LogitDifference",
    "Model",
    "Plan",
    "Pool",
    "Problem",
    "Prompts",
    "Runtime",
    "Scale",
    "Schedule",
    "Set",
    "Site",
    "Solution",
    "Surface",
    "Verdict",
    "certify",
    "check",
    "defend",
    "find_perturbation",
    "fit_shared",
    "load_config",
    "load_examples",
    "load_model",
    "load_run",
    "load_sae",
    "run_check",
    "select_features",
    "smallest_perturbation",
]
