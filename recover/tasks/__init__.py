"""Tasks: where a check's prompts, behaviors and answers come from."""

from recover.tasks.behaviors import AnswerLikelihood
from recover.tasks.probe import prepare as prepare_probes
from recover.tasks.prose import NEUTRAL
from recover.tasks.registry import TASKS, Task, get_task, load_examples, read_options
from recover.tasks.replies import degenerate
from recover.tasks.retained import StillRight, still_right

__all__ = [
    "NEUTRAL",
    "TASKS",
    "AnswerLikelihood",
    "StillRight",
    "Task",
    "degenerate",
    "get_task",
    "load_examples",
    "prepare_probes",
    "read_options",
    "still_right",
]
