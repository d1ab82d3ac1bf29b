"""The host model: loading by name, forward passes that read and edit the residual stream, and greedy generation.

Read `host` first: `Model.run` is the one forward pass that everything else uses. `names` loads models by name,
`generation` writes answers, `components` names attention heads and MLPs, and `capacity` estimates batch sizes.
"""

from recover.models.capacity import bytes_a_prompt
from recover.models.components import Component
from recover.models.generation import NO_TOKEN, answered, generate, texts
from recover.models.host import Change, Edit, Model, Prompts, Run, Suffix
from recover.models.names import (
    LoadedModel,
    load_model,
    resolve_device,
    resolve_model,
    shipped_models,
    shipped_questions,
)

__all__ = [
    "NO_TOKEN",
    "Change",
    "Component",
    "Edit",
    "LoadedModel",
    "Model",
    "Prompts",
    "Run",
    "Suffix",
    "answered",
    "bytes_a_prompt",
    "generate",
    "load_model",
    "resolve_device",
    "resolve_model",
    "shipped_models",
    "shipped_questions",
    "texts",
]
