"""`check()`: the protocol, from a defense and prompts to a verdict.

1. *Fit*: does each SAE describe its site on these prompts?
2. *Accounting*: which examples show the behavior without the defense and not with it.
3. *Search* within the budget, under C1, for every valid flip; what is not solved is looked at again without gradients.
4. *Certificate* of every delta, by an independent replay.
5. *Verdict* from the records of 2 to 4.

Examples go through 2 to 4 in batches, and each finished batch is handed to a `Store`. The batches of a run are fixed
from its start, so that a run that was interrupted goes on with the same arithmetic and reaches the same verdict.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch

from recover.behavior import Behavior
from recover.certify import certify
from recover.clamp import Defense
from recover.constraint import Budget, EncoderOrthogonal
from recover.defended import Placement, defend
from recover.fit import Fit, measure_fit
from recover.gradient_free import reexamined
from recover.model import Model, Prompts
from recover.records import ExampleRecord, certificate_records, search_records
from recover.search import Schedule, recover
from recover.types import InputError, Int, Site, Tensor
from recover.verdict import Verdict, decide, fit_gates

FIT_PROMPTS = 32
Progress = Callable[[str, int, int], None]
"""`progress(phase, done, total)`."""


@dataclass(frozen=True, eq=False)
class Examples:
    """What is asked of the model: ids, prompts and one behavior entry each; `texts` only to be kept."""

    ids: Sequence[str]
    prompts: Prompts
    behavior: Behavior
    texts: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if not len(self.ids) == len(self.prompts) or not len(self.ids):
            raise InputError(
                f"examples: {len(self.ids)} ids for {len(self.prompts)} prompts; give one each, at least one"
            )
        if len(set(self.ids)) < len(self.ids):
            raise InputError("examples: two have the same id; each needs its own")

    def select(self, rows: Int[Tensor, "rows"]) -> Examples:
        """The same for the examples `rows`."""
        pick = rows.tolist()
        texts = None if self.texts is None else [self.texts[row] for row in pick]
        return Examples([self.ids[row] for row in pick], self.prompts.select(rows), self.behavior.select(rows), texts)


@runtime_checkable
class Store(Protocol):
    """Where finished examples go, and where an interrupted run finds them again."""

    def finished(self) -> Mapping[str, ExampleRecord]:
        """The records of the examples that are done, by id."""

    def save_deltas(self, deltas: Mapping[str, Tensor]) -> None:
        """Keep the delta `[n_pos d_model]` of each example searched, before anything is said of it."""

    def delta(self, example: str) -> Tensor:
        """A saved delta, read back."""

    def save(self, records: Sequence[ExampleRecord]) -> None:
        """Keep the records of a batch: from here on its examples are finished."""


class Memory:
    """A store that lasts as long as the object."""

    def __init__(self) -> None:
        self.records: dict[str, ExampleRecord] = {}
        self.deltas: dict[str, Tensor] = {}

    def finished(self) -> Mapping[str, ExampleRecord]:
        return self.records

    def save_deltas(self, deltas: Mapping[str, Tensor]) -> None:
        self.deltas |= deltas

    def delta(self, example: str) -> Tensor:
        return self.deltas[example]

    def save(self, records: Sequence[ExampleRecord]) -> None:
        self.records |= {record.id: record for record in records}


def check(
    model: Model,
    defense: Defense,
    examples: Examples,
    *,
    budget: float,
    placement: Placement = "after_clamp",
    schedule: Schedule | None = None,
    batch_size: int | None = None,
    store: Store | None = None,
    exact: Model | None = None,
    provenance: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Verdict:
    """Run the protocol.

    Args:
        model: the host model.
        defense: its clamps, at one site.
        examples: prompts and behavior.
        budget: largest Frobenius norm of a delta.
        placement: whether a delta enters after or before the clamp.
        schedule: how hard to search.
        batch_size: examples at once; by default as many as memory allows.
        store: where finished batches are kept; in memory by default.
        exact: the same model in float32, for certificates; `model` itself by default.
        provenance: what the verdict should say about where it came from.
        progress: called as examples finish.

    Raises:
        InputError: a defense over several sites, one that does not fit the model, or a budget that is no norm.
    """
    check_one_site(defense.sites)
    Budget(budget)  # refuses what is no norm, also where nothing will be searched
    store, schedule, report = store or Memory(), schedule or Schedule(), progress or (lambda *_: None)
    widest = max(clamp.sae.d_sae for clamp in defense.clamps)
    fitting = model.batch_size(examples.prompts, widest)
    size = fitting if batch_size is None else min(batch_size, fitting if model.recurrent else batch_size)
    fits = measure_fits(model, defense, examples, size)
    valid = all(gate.passed for gate in fit_gates(fits))
    rows = torch.arange(len(examples.ids))
    report("examples", 0, len(rows))
    for batch in torch.split(rows, size):
        if any(examples.ids[row] not in store.finished() for row in batch.tolist()):
            part = examples.select(batch)
            _check_batch(model, exact or model, defense, part, budget, placement, schedule, store, report, search=valid)
        report("examples", int(batch[-1]) + 1, len(rows))
    records = [store.finished()[example] for example in examples.ids]
    threat = threat_model(model, defense, budget, placement)
    return decide(records, fits, budget, str(model.dtype).removeprefix("torch."), threat, provenance or {})


def check_one_site(sites: Sequence[Site]) -> None:
    """Raises:
    InputError: there are several.
    """
    if len({site.index for site in sites}) > 1:
        names = ", ".join(site.hook_name for site in sites)
        raise InputError(f"defense: clamps at several sites ({names}); this version checks one site at a time")


def measure_fits(model: Model, defense: Defense, examples: Examples, batch_size: int) -> list[Fit]:
    """The fit of each clamp's SAE on the first prompts, once for each site."""
    some = examples.prompts.select(torch.arange(min(FIT_PROMPTS, len(examples.ids))))
    return [measure_fit(model, defense.at(site)[0].sae, site, some, batch_size) for site in defense.sites]


def threat_model(model: Model, defense: Defense, budget: float, placement: Placement) -> dict[str, Any]:
    """Who may do what, as recorded in the verdict."""
    return {
        "access": "white-box, one perturbation an example",
        "sites": [site.hook_name for site in defense.sites],
        "positions": "last",
        "placement": placement,
        "constraint": "orthogonal to the encoder columns of the clamped features (C1)",
        "norm": "Frobenius, over positions and dimensions",
        "budget": budget,
        "clamp": "live",
        "skip_first": defense.skip_first,
        "dtype": str(model.dtype).removeprefix("torch."),
        "clamps": [
            {
                "site": clamp.site.hook_name,
                "k": len(clamp.features),
                "mode": type(clamp.mode).__name__.lower(),
                "value": astuple(clamp.mode)[0],
                "only_active": clamp.only_active,
                "positions": clamp.positions,
            }
            for clamp in defense.clamps
        ],
    }


def _check_batch(
    model: Model,
    exact: Model,
    defense: Defense,
    examples: Examples,
    budget: float,
    placement: Placement,
    schedule: Schedule,
    store: Store,
    report: Progress,
    *,
    search: bool,
) -> None:
    """Accounting, search and certificates of one batch, saved as they are done."""
    defended = defend(model, defense, examples.prompts, examples.behavior, placement=placement)
    base = examples.behavior.slack(defended.base_logits).tolist()
    under = examples.behavior.slack(defended.defended_logits).tolist()
    texts: Sequence[str | None] = examples.texts or [None] * len(base)
    rows = zip(examples.ids, base, under, texts, strict=True)
    records = [ExampleRecord(name, shown, left, text=text) for name, shown, left, text in rows]
    flips = defended.valid_flips
    if search and len(flips):
        target, part = defended.select(flips), examples.select(flips)
        constraint = EncoderOrthogonal.of(*defense.at(defense.sites[0]))
        solution = recover(
            target,
            target.zero_delta,
            constraint,
            budget,
            schedule,
            on_step=lambda _, left: report("search", len(flips) - left, len(flips)),
        )
        solution = reexamined(target, solution, constraint, budget, schedule)
        store.save_deltas(dict(zip(part.ids, solution.delta.cpu(), strict=True)))
        saved = torch.stack([store.delta(name) for name in part.ids])
        certificate = certify(exact, defense, part.prompts, part.behavior, saved, placement)
        found = zip(flips.tolist(), search_records(solution), certificate_records(certificate), strict=True)
        for row, searched, facts in found:
            records[row] = replace(records[row], search=searched, certificate=facts)
    store.save(records)
