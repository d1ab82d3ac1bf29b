"""From a configuration, or from objects in memory, to a verdict on disk.

1. Open the folder, and refuse it if it cannot be used or holds another run: before the slow part.
2. Load what is checked: model, SAEs and prompts of a configuration (`recover.run.setting`), or objects as they are
   (`recover.run.objects`). Features given by a rule are selected here. A run that was interrupted keeps the features
   and the batch size that it began with.
3. Run `check()`, which saves each batch as it is finished.
4. Write `verdict.json`, and the reports from it. A run that has them is not run again.

Several workers (`workers`) load the same and come to the same verdict. One of them leads: it holds the folder, fixes
what the run holds to, and writes what is written once.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recover.protocol.checking import check
from recover.protocol.folder import CONFIG, SEEDS, VERDICT, RunFolder, RunState, write_whole
from recover.protocol.runtime import Runtime
from recover.protocol.verdict_model import Verdict
from recover.protocol.workers import ALONE, Workers
from recover.report.finished import find_run, pages
from recover.report.published import compared
from recover.run.config import Config
from recover.run.objects import Objects
from recover.run.setting import Chosen, Setting, load_setting, threads
from recover.types import InputError, Progress


@dataclass(frozen=True)
class FromConfig:
    """A configuration as the source of a run."""

    config: Config
    keep_text: bool = False

    @property
    def text(self) -> str:
        """The text of `config.yaml`."""
        return self.config.dump_yaml()

    def relevant(self) -> dict[str, Any]:
        """Give what of the configuration can change a result."""
        return self.config.relevant()

    def load(self, progress: Progress, *, alone: bool) -> Setting:
        """Load what the configuration names."""
        if not alone:
            _refuse_a_shared_card(self.config)
        return load_setting(self.config, keep_text=self.keep_text, progress=progress)

    def beside_published(self, verdict: Verdict) -> Verdict:
        """Set the figures that the configuration says were published beside the verdict's own."""
        return beside_published(verdict, self.config)


class OtherRunError(InputError):
    """A folder that holds a run of the same configuration, and yet another run."""


Source = FromConfig | Objects
"""Where the subject of a run comes from."""
Subject = Setting | Objects
"""What a run checks, loaded."""


def run_check(
    config: Config, out: Path, *, keep_text: bool = False, progress: Progress | None = None, workers: Workers = ALONE
) -> Verdict:
    """Check the defense of `config` and leave the artifacts in `out`.

    Args:
        config: what to check.
        out: a new or empty folder, or one that holds an earlier run of the same configuration.
        keep_text: whether prompts may appear in the artifacts.
        progress: called with (phase, done, total).
        workers: the processes that share the run, each of which calls this with the same arguments.

    Raises:
        InputError: anything that the configuration names cannot be used, or the folder cannot.
        LostWorkerError: another worker has gone.
    """
    return run_source(FromConfig(config, keep_text), out, progress, workers)


def run_source(source: Source, out: Path, progress: Progress | None = None, workers: Workers = ALONE) -> Verdict:
    """Check what a source gives and leave the artifacts in `out`; arguments and errors as of `run_check`."""
    with workers.together():
        folder = RunFolder(out, holds=workers.leads)
    try:
        return _run(source, folder, progress or (lambda *_: None), workers)
    finally:
        folder.close()


def run_seeds(
    config: Config,
    out: Path,
    seeds: int,
    *,
    keep_text: bool = False,
    progress: Progress | None = None,
    workers: Workers = ALONE,
) -> list[Verdict]:
    """Repeat a check with several seeds of the search, the split and the controls; the prompts stay.

    Each has its own folder `out/seed-N`, and `out/seeds.json` says how often each verdict came. Arguments and errors
    are those of `run_check`.
    """
    verdicts = []
    for seed in range(config.controls.seed, config.controls.seed + seeds):
        one = config.with_control_seed(seed)
        verdicts.append(run_check(one, out / f"seed-{seed}", keep_text=keep_text, progress=progress, workers=workers))
    said = Counter((verdict.verdict, verdict.content, verdict.rule) for verdict in verdicts)
    told = {True: True, False: False, None: "unknown"}
    counted = [
        {"verdict": name, "content": told[content], "rule": told[rule], "seeds": n}
        for (name, content, rule), n in said.items()
    ]
    try:
        if workers.leads:
            write_whole(out / SEEDS, (json.dumps({"verdicts": counted}, indent=2) + "\n").encode())
    except OSError as error:
        raise InputError(f"--out {out}: {SEEDS} cannot be written ({error.strerror}); mend that") from None
    return verdicts


def _run(source: Source, folder: RunFolder, progress: Progress, workers: Workers) -> Verdict:
    started = time.perf_counter()
    with workers.together():
        if folder.state is not None:
            _expect(folder, folder.state, source)
            folder.resume()
    earlier = workers.led(folder.units)
    for unit, given in () if workers.leads else earlier.items():
        folder.take(unit, given)
    progress("loading", 0, 1)
    with workers.together():
        subject = source.load(progress, alone=workers.size == 1)
    progress("loading", 1, 1)
    size = min(workers.gather(subject.batch_size))
    with workers.together():
        begun = folder.state or (_begin(folder, source, subject, size, progress) if workers.leads else None)
    state = workers.led(begun)
    with workers.together():
        if state.fingerprint != subject.fingerprint:
            raise OtherRunError(
                f"{folder.name}: holds a run of this configuration with other weights, prompts or another version of "
                "recover; give another folder"
            )
        if workers.leads and not folder.has([CONFIG]):
            folder.write(CONFIG, source.text.encode())
    (finished,) = workers.led((find_run(folder.path) if workers.leads else None,))
    if finished is not None:
        verdict = source.beside_published(finished.verdict).model_copy(update={"records": finished.records})
    else:
        _tell_of_idle_workers(subject, state, workers)
        with threads(state.threads):
            said = _check(subject, state, folder, progress, workers)
        verdict = source.beside_published(said).took(round(time.perf_counter() - started, 1))
    with workers.together():
        if workers.leads:
            changed = finished is None or verdict.published != finished.verdict.published
            if finished is None:
                folder.finish(verdict.records)
            elif changed:
                folder.write(CONFIG, source.text.encode())
            if changed:
                folder.write_json(VERDICT, verdict.to_dict())
            for name, page in pages(verdict, folder.read(CONFIG), verdict.records, state.features).items():
                folder.write(name, page)
    return verdict


def beside_published(verdict: Verdict, config: Config) -> Verdict:
    """A verdict, and beside it the figures of `config` that were published, if any."""
    given = config.published
    rows = () if given is None or not given.figures else compared(verdict, given.known(), given.source)
    return verdict.model_copy(update={"published": rows})


def _refuse_a_shared_card(config: Config) -> None:
    """Several workers have a card each, which `torchrun` numbers."""
    theirs = "under torchrun each worker has one of its own"
    if config.device_map is not None:
        raise InputError(f"device_map: it spreads one model over all cards, and {theirs}; use one of the two")
    if config.device.startswith("cuda:"):
        raise InputError(f"device: {config.device} is one card, and {theirs}; write cuda")


def _expect(folder: RunFolder, state: RunState, source: Source) -> None:
    """Refuse the folder of another configuration's run, naming the first difference."""
    theirs = state.config | {"--keep-text": state.keep_text}
    ours = source.relevant() | {"--keep-text": source.keep_text}
    if (difference := _first_difference(theirs, ours)) is not None:
        raise InputError(f"{folder.name}: holds the run of another configuration ({difference}); give another folder")


def _first_difference(theirs: Any, ours: Any, at: str = "") -> str | None:
    if isinstance(theirs, dict) and isinstance(ours, dict):
        pairs = [(f"{at}.{key}".lstrip("."), theirs.get(key), ours.get(key)) for key in {**theirs, **ours}]
    elif isinstance(theirs, list) and isinstance(ours, list) and len(theirs) == len(ours):
        pairs = [(f"{at}[{index}]", *pair) for index, pair in enumerate(zip(theirs, ours, strict=True))]
    else:
        return None if theirs == ours else f"{at} is {theirs!r:.40} there and {ours!r:.40} here"
    return next(filter(None, (_first_difference(left, right, name) for name, left, right in pairs)), None)


def _begin(folder: RunFolder, source: Source, subject: Subject, size: int, progress: Progress) -> RunState:
    """Fix what the whole run holds to."""
    number = subject.threads
    with threads(number):
        chosen = subject.choose(size, progress)
    subject.build(chosen)  # what cannot be built is refused before the run has begun
    state = RunState(
        config=source.relevant(),
        keep_text=source.keep_text,
        fingerprint=subject.fingerprint,
        batch_size=size,
        features=[list(one.features) for one in chosen],
        values=[list(one.value) if isinstance(one.value, tuple) else one.value for one in chosen],
        threads=number,
    )
    folder.begin(state)
    return state


def _tell_of_idle_workers(subject: Subject, state: RunState, workers: Workers) -> None:
    """Warn where batches, the same for any number of workers so that the verdict is, are too few for all of them."""
    examples = len(subject.examples.ids)
    batches = -(-examples // state.batch_size)
    if workers.leads and batches < workers.size:
        print(
            f"recover: {examples} examples at {state.batch_size} at once are too few batches ({batches}) for "
            f"{workers.size} workers; a smaller --batch-size, given when a run begins, lets all of them search",
            file=sys.stderr,
        )


def _check(subject: Subject, state: RunState, folder: RunFolder, progress: Progress, workers: Workers) -> Verdict:
    defense = subject.build(Chosen.kept_by(state))
    provenance = {**subject.provenance, "threads": state.threads, "workers": workers.size}
    runtime = Runtime(state.batch_size, folder, subject.exact, subject.neutral, provenance, progress, workers)
    return check(subject.model, defense, subject.examples, subject.budget, plan=subject.plan, runtime=runtime)
