"""From objects in memory to a verdict on disk: `check()` whose folder is named by a hash of all that it depends on.

The weights, the SAEs, the clamps, the tokens, the behavior, the budget and every option are hashed, so that the same
objects find their run again, an interrupted one goes on, and other ones get another folder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch

from recover.defenses.clamps import Defense
from recover.models.host import Model
from recover.protocol.checking import Progress, check
from recover.protocol.folder import CONFIG, VERDICT, RunFolder, RunState
from recover.protocol.plan import Plan
from recover.protocol.verdict_model import Verdict
from recover.report.finished import find_run, pages
from recover.run.setting import package_versions
from recover.tasks.examples import Examples
from recover.types import Tensor

__all__ = ["check_objects", "content_hash"]


def check_objects(
    parent: Path, model: Model, defense: Defense, examples: Examples, *, seed: int | None = None, **options: Any
) -> tuple[Path, Callable[[Progress | None], Verdict]]:
    """Where the run of these objects is kept, and what makes it: or reads it, where it is there.

    Args:
        parent: the run's folder is made in it.
        model: the host model.
        defense: its clamps.
        examples: prompts and behavior.
        seed: of the controls, in the place of the plan's.
        options: as `check` takes them, plain values and dataclasses; not its store.
    """
    plan = options.pop("plan", None) or Plan()
    if seed is not None:
        plan = replace(plan, seed=plan.seed + seed)
    digest = content_hash(model, defense, examples, plan, options, package_versions()["recover"])
    folder = parent / f"objects-{digest[:16]}"

    def run(progress: Progress | None = None) -> Verdict:
        held = RunFolder(folder)
        try:
            if (finished := find_run(folder)) is not None:
                return finished.verdict
            if held.state is None:
                clamps = defense.clamps
                held.begin(
                    RunState(
                        config={"hash": digest},
                        keep_text=False,
                        fingerprint=digest,
                        batch_size=options.get("batch_size") or 0,
                        features=[list(clamp.features) for clamp in clamps],
                        values=[0.0] * len(clamps),
                    )
                )
            else:
                held.resume()
            held.write(CONFIG, b"# checked from objects in memory, which no file describes\n")
            provenance = {
                "versions": package_versions(),
                "seed": 0,
                "device": str(model.device),
                "dtype": str(model.dtype).removeprefix("torch."),
                "sae_sha256": {},
                "model": f"{type(model.module).__name__} in memory ({digest[:16]})",
            }
            said = check(
                model, defense, examples, plan=plan, store=held, provenance=provenance, progress=progress, **options
            )
            verdict = said.took(said.provenance.phase_seconds)
            held.finish(said.records)
            held.write_json(VERDICT, verdict.to_dict())
            features = [list(clamp.features) for clamp in defense.clamps]
            for name, page in pages(verdict, held.read(CONFIG), said.records, features).items():
                held.write(name, page)
            return verdict
        finally:
            held.close()

    return folder, run


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
