"""Tasks: where a check's prompts, behaviors and answers come from."""

from recover.tasks.registry import TASKS, Task, ask_task, get_task, read_options

__all__ = ["TASKS", "Task", "ask_task", "get_task", "read_options"]
