"""Tasks: where a check's prompts, behaviors and answers come from."""

from recover.tasks.registry import TASKS, Task, get_task, load_examples, read_options

__all__ = ["TASKS", "Task", "get_task", "load_examples", "read_options"]
