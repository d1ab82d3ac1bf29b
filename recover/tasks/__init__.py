"""Tasks: where the prompts, behaviors and answers of a check come from.

Read `registry` first (`load_examples`), then `examples` (what a task returns) and `behaviors` (the predicates and
their differentiable scores). Each task has a module: `ioi`, `choice`, `cloze`, `probe` and `refusal`.
"""

from recover.tasks.behaviors import (
    AnswerLikelihood,
    Behavior,
    ChoiceCrossEntropy,
    ChoiceMargin,
    ChoiceOdds,
    ForcedAnswer,
    LogitDifference,
    Targeted,
    VocabularyMargin,
    positions_read,
)
from recover.tasks.dialogue import Dialogue, Request, ask
from recover.tasks.examples import Contrast, Examples
from recover.tasks.probe import prepare as prepare_probes
from recover.tasks.prose import NEUTRAL
from recover.tasks.registry import TASKS, Task, get_task, load_examples, read_options
from recover.tasks.replies import degenerate
from recover.tasks.retained import StillRight, still_right
from recover.tasks.rules import OtherRule, all_rules, generic_rules

__all__ = [
    "NEUTRAL",
    "TASKS",
    "AnswerLikelihood",
    "Behavior",
    "ChoiceCrossEntropy",
    "ChoiceMargin",
    "ChoiceOdds",
    "Contrast",
    "Dialogue",
    "Examples",
    "ForcedAnswer",
    "LogitDifference",
    "OtherRule",
    "Request",
    "StillRight",
    "Targeted",
    "Task",
    "VocabularyMargin",
    "all_rules",
    "ask",
    "degenerate",
    "generic_rules",
    "get_task",
    "load_examples",
    "positions_read",
    "prepare_probes",
    "read_options",
    "still_right",
]
