"""Objects in memory as the subject of a run, whose folder is named by a hash of all that its result depends on.

The weights, the SAEs, the clamps, the tokens, the behavior, the budget and the plan are hashed. So the same objects
find their run again, an interrupted run goes on, and other objects get another folder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cached_property
from typing import Any

import torch

from recover.defenses.clamps import Defense
from recover.models.host import Model, Prompts
from recover.protocol.plan import Plan
from recover.protocol.runtime import Runtime
from recover.protocol.verdict_model import Verdict
from recover.run.setting import Chosen, package_versions
from recover.tasks.examples import Examples
from recover.types import InputError, Progress, Tensor


@dataclass(frozen=True, eq=False)
class Objects:
    """The arguments of `check`, to be run as a configuration is (`recover.run.runner`).

    Of the runtime, batch size, exact model and neutral text count; the runner sets the rest.

    Raises:
        InputError: a store or workers in `runtime`, which are the runner's.
    """

    model: Model
    defense: Defense
    examples: Examples
    budget: float
    plan: Plan = field(default_factory=Plan)
    runtime: Runtime = field(default_factory=Runtime)

    keep_text = False
    text = "# checked from objects in memory, which no file describes\n"

    def __post_init__(self) -> None:
        if self.runtime.store is not None or self.runtime.workers.size > 1:
            raise InputError("runtime: a run keeps its units in its own folder; leave store and workers out")

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of everything that can change a result."""
        how = (self.runtime.batch_size, self.runtime.exact, self.runtime.neutral)
        version = package_versions()["recover"]
        return content_hash(self.model, self.defense, self.examples, self.budget, self.plan, how, version)

    @property
    def name(self) -> str:
        """Name of the run's folder."""
        return f"objects-{self.fingerprint[:16]}"

    def relevant(self) -> dict[str, Any]:
        """Give what identifies the run, in place of a configuration."""
        return {"hash": self.fingerprint}

    def load(self, progress: Progress, *, alone: bool) -> Objects:
        """Give the objects, which are loaded already."""
        return self

    def beside_published(self, verdict: Verdict) -> Verdict:
        """Give the verdict: nothing was published on objects."""
        return verdict

    @property
    def batch_size(self) -> int:
        """Examples at once: as asked, or as many as memory allows."""
        widest = max(clamp.sae.d_sae for clamp in self.defense.clamps)
        return self.runtime.batch_size or self.model.batch_size(self.examples.prompts, widest)

    @property
    def threads(self) -> int:
        """Threads of the CPU, as torch is set."""
        return torch.get_num_threads()

    @property
    def exact(self) -> Model | None:
        """The model that certificates replay in."""
        return self.runtime.exact

    @property
    def neutral(self) -> Prompts | None:
        """Passages of ordinary text."""
        return self.runtime.neutral

    @property
    def provenance(self) -> dict[str, Any]:
        """Which code, weights and device give the verdict."""
        return {
            "versions": package_versions(),
            "seed": 0,
            "device": str(self.model.device),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "sae_sha256": {},
            "model": f"{type(self.model.module).__name__} in memory ({self.fingerprint[:16]})",
            **self.runtime.provenance,
        }

    def choose(self, batch_size: int, progress: Progress) -> list[Chosen]:
        """Give the features that the defense has."""
        return [Chosen(clamp.features, 0.0) for clamp in self.defense.clamps]

    def build(self, chosen: Sequence[Chosen]) -> Defense:
        """Give the defense."""
        return self.defense


def content_hash(model: Model, *values: Any) -> str:
    """SHA-256 of a model's weights and of values: tensors by content, dataclasses by field, the rest by `repr`."""
    digest = hashlib.sha256(type(model.module).__name__.encode())
    for name, tensor in model.module.state_dict().items():
        _feed(digest, (name, tensor))
    for value in values:
        _feed(digest, value)
    return digest.hexdigest()


def _feed(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    elif is_dataclass(value) and not isinstance(value, type):
        digest.update(type(value).__name__.encode())
        for one in fields(value):
            _feed(digest, (one.name, getattr(value, one.name)))
    elif isinstance(value, dict):
        for key in sorted(value, key=repr):
            _feed(digest, (key, value[key]))
    elif isinstance(value, Iterable) and not isinstance(value, str | bytes):
        digest.update(b"(")
        for one in value:
            _feed(digest, one)
        digest.update(b")")
    elif isinstance(value, Model):
        _feed(digest, dict(value.module.state_dict()))
    else:
        digest.update(repr(value).encode())
