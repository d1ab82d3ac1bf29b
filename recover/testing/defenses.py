"""Defenses kept as tests: what `check_defense` is, and what tests assert of what it gives.

    def test_the_defense_holds(check_defense):
        checked = check_defense("defense.yaml")
        assert_not_recovered(checked, budget=10)

1. *Check*: the fixture `check_defense` runs `recover check` on a DEFENSE.yaml, or `recover.check` on objects. A file is
   looked for beside the test, and the model, SAEs and prompts that it names beside the file; what is not there, in the
   working folder.
2. *Cache*: a run's folder is named by a hash of all that it depends on, in pytest's cache (`--recovery-dir`). Several
   assertions cost one search, a later session none, and one that was interrupted goes on. Workers of xdist wait for
   each other where they need the same run.
3. *Seeds*: with `--recovery-seeds N` each check is run with N control seeds, and assertions must hold in all of them.
4. *Assertions* (`assertions`) read the verdict; one that fails names the figure, the bound and the folder.

After the tests a table says what was checked; `--recovery-json FILE` writes the verdicts, `--recovery-report DIR` keeps
a report of each. Markers `gpu` and `hub` skip with a reason where there is no CUDA device or no Hugging Face hub;
`slow` is there to be deselected with `-m "not slow"`. All of these are in `recover_pytest`, which pytest loads.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock, Timeout

from recover.defenses.clamps import Defense
from recover.models.host import Model
from recover.models.names import OURS, shipped_models, shipped_questions
from recover.protocol.folder import VERDICT
from recover.protocol.plan import Plan
from recover.protocol.runtime import Runtime
from recover.protocol.verdict_model import Verdict
from recover.run.config import Config, load_config
from recover.run.objects import Objects
from recover.run.progress import shown
from recover.run.runner import OtherRunError, run_check, run_source
from recover.saes.names import shipped_saes
from recover.tasks.examples import Examples
from recover.testing.assertions import Checked
from recover.types import InputError, Progress

Run = Callable[[Progress | None], Verdict]
MOVED = {
    "schedule": "give plan=Plan(schedule=...)",
    "placement": "give plan=Plan(surface=Surface(placement=...))",
    "every_site": 'give plan=Plan(surface=Surface("every"))',
    **{one: f"give runtime=Runtime({one}=...)" for one in ("batch_size", "exact", "neutral", "provenance")},
}
"""Where options of `check` went that it took one by one."""


class Defenses:
    """Runs checks and remembers them: what `check_defense` is.

    Args:
        folder: where runs are kept.
        seeds: control seeds of each.
        runs: what `verdict.json` holds of each check of this session, by folder, for the table at its end.
        beside: gives the folder that relative paths are looked for in first.
        aloud: makes a context in which stderr is seen, where it gives that there is somebody to see it.
    """

    def __init__(
        self,
        folder: Path,
        seeds: int,
        runs: dict[str, dict[str, Any]],
        beside: Callable[[], Path] = Path.cwd,
        aloud: Callable[[], AbstractContextManager[bool]] = lambda: contextlib.nullcontext(False),
    ) -> None:
        self.folder, self.seeds, self.runs, self.beside, self.aloud = folder, seeds, runs, beside, aloud
        self._verdicts: dict[Path, Verdict] = {}

    def __call__(self, defense: Path | str | Defense, **options: Any) -> Checked:
        """Check a defense; a check that was done before is not done again.

        What cannot be used fails the test, in one line.

        Args:
            defense: a DEFENSE.yaml, or a `Defense`.
            **options: of a file, what overrides it by dotted key, such as `**{"search.budget": 5.0}`; of a `Defense`,
                the arguments of `recover.check`: `model=`, `examples=`, `budget=`, `plan=` and `runtime=`; and `name=`.
        """
        try:
            return self._objects(defense, **options) if isinstance(defense, Defense) else self._file(defense, options)
        except InputError as error:
            told = " ".join(str(error).split())
        pytest.fail(told, pytrace=False)

    def _file(self, defense: Path | str, options: dict[str, Any]) -> Checked:
        there = self.beside() / defense
        path = there if there.exists() or not Path(defense).exists() else Path(defense)
        config = _anchored(load_config(path, options), path.absolute().parent)
        configs = [config.with_control_seed(config.controls.seed + number) for number in range(self.seeds)]
        return self._remembered(path.name, [self._of_file(path.name, one) for one in configs])

    def _of_file(self, name: str, config: Config) -> tuple[Verdict, Path]:
        folder = self.folder / f"{Path(name).stem}-{config.fingerprint()[:16]}"

        def once(progress: Progress | None) -> Verdict:
            try:
                return run_check(config, folder, progress=progress)
            except OtherRunError:
                shutil.rmtree(folder)  # of other weights or prompts under the same names: ours to make again
                return run_check(config, folder, progress=progress)

        return self._once(name, folder, once), folder

    def _objects(
        self,
        defense: Defense,
        *,
        model: Model,
        examples: Examples,
        budget: float,
        plan: Plan | None = None,
        runtime: Runtime | None = None,
        name: str = "objects",
        **unknown: Any,
    ) -> Checked:
        for one in unknown:
            raise InputError(f"check_defense: {one}: {MOVED.get(one, 'a Defense takes no such option')}")
        plan, found = plan or Plan(), []
        for seed in range(self.seeds):
            seeded = replace(plan, seed=plan.seed + seed)
            objects = Objects(model, defense, examples, budget, seeded, runtime or Runtime())
            folder = self.folder / objects.name
            found.append((self._once(name, folder, partial(run_source, objects, folder)), folder))
        return self._remembered(name, found)

    def _once(self, name: str, folder: Path, run: Run) -> Verdict:
        """The verdict of this session, or the run's; alone in its folder, and telling how far it is."""
        if folder in self._verdicts:
            return self._verdicts[folder]
        with self.aloud() as heard, _alone(folder, heard):
            if not heard or (folder / VERDICT).is_file():
                return run(None)
            _tell(f"checking {name}; interrupt it, and the next session goes on from there")
            with shown() as progress:
                return run(progress)

    def _remembered(self, name: str, found: Sequence[tuple[Verdict, Path]]) -> Checked:
        for verdict, folder in found:
            self._verdicts[folder] = verdict
            self.runs[str(folder)] = {**verdict.to_dict(), "name": name}
        verdicts, folders = zip(*found, strict=True)
        return Checked(name, verdicts, folders)


def _anchored(config: Config, folder: Path) -> Config:
    """Name what lies in this folder by its whole path, as a session may be started from anywhere."""

    def place(name: str, ours: Sequence[str]) -> str:
        there = folder / name
        return str(there) if name not in ours and there.exists() else name

    clamps = tuple(one.model_copy(update={"sae": place(one.sae, [*shipped_saes()])}) for one in config.clamps)
    prompts = config.prompts
    if prompts.file is not None:
        prompts = prompts.model_copy(update={"file": place(prompts.file, [*shipped_questions()])})
    model = place(config.model, [*OURS, *shipped_models()])
    return config.model_copy(update={"model": model, "clamps": clamps, "prompts": prompts})


@contextlib.contextmanager
def _alone(folder: Path, heard: bool) -> Iterator[None]:
    """One process at a time: the second finds what the first has finished."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_name(f".{folder.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if heard:
            _tell(f"waiting for another session that is at work in {folder}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _tell(what: str) -> None:
    print(f"\nrecover: {what}", file=sys.stderr, flush=True)
