"""The phases of a check that go example by example, each a function of one batch of the bench.

==================  ==================================================================================================
`accounting`        does the behavior show without the defense, and with it?
`search`            for each valid flip the best that several solvers find under C1, and the smallest norm
`certificates`      of the delta within the budget and of the smallest one, both read back from where they were saved
`attribution`       where the effect of the delta within the budget is: its parts, replayed and knocked out
`undoing`           what that delta does downstream, beside what lifting the clamp does
`placebo`           the same search for an unrelated target
`write_orthogonal`  the same search under C1+: orthogonal to what the clamp writes as well
`budgets`           a search at each budget of the curve alone, and one of twice the steps: is the search in order?
`undefended`        can the search find a way back that is known to exist?
==================  ==================================================================================================

A phase gives plain values by example id, which later become an `ExampleRecord`, and deltas to be saved.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch

from recover.defenses.defended import Defended
from recover.evidence.attribution.parts import attribute
from recover.evidence.certificate import Certificate, certify, free_drift
from recover.evidence.controls import Anywhere, Undefended, displacement, longest, placebo_targets
from recover.evidence.undoing import undoing as undoing_of
from recover.models.generation import texts
from recover.protocol import travel
from recover.protocol.bench import Batch, Bench
from recover.protocol.records import certificate_values, search_values, without_nan
from recover.search.ascent import find_perturbation
from recover.search.constraints.pinned import Pinned
from recover.search.gradient_free import reexamined
from recover.search.pinned import shorten
from recover.search.solvers import FURTHER, SOLVERS, Solver, WorstCase, first_reaching, random_draws, worst_case
from recover.tasks import replies as refusal
from recover.tasks.behaviors import Targeted, known_targets
from recover.tasks.examples import Examples
from recover.types import Delta, Tensor

BY_GRADIENT = {name: solver for name, solver in SOLVERS.items() if name != "random"}
"""Controls are searched with these, and compared with what these found for the behavior itself."""
SMALLEST = "/smallest"
ROUNDED = 1 - 1e-6
"""Share of a budget to aim at, so that rounding in what is saved cannot exceed the budget."""
KEPT = ("shows", "held", "slack", "norm", "relative_norm", "displacement", "constraint_residual")


@dataclass(frozen=True, eq=False)
class Done:
    """The result of a phase on a batch: values by example id, and deltas by name."""

    values: Mapping[str, Mapping[str, Any]]
    deltas: Mapping[str, Tensor] = field(default_factory=dict)


@runtime_checkable
class Deltas(Protocol):
    """Where saved deltas are read back."""

    def delta(self, name: str) -> Tensor:
        """A saved delta `[n_pos d_model]`."""


BatchProgress = Callable[[int, int], None]
"""`progress(done, total)` within a batch: examples that are solved, and all."""
Phase = Callable[[Bench, Batch, Deltas, BatchProgress], Done]


def accounting(bench: Bench, batch: Batch, deltas: Deltas, progress: BatchProgress) -> Done:
    """Slack without the defense and with it, by both predicates; how replies open; the text, where it is kept."""
    columns = [values.tolist() for values in (batch.base, batch.under, batch.strict_base, batch.strict_under)]
    names = ("base_slack", "defended_slack", "strict_base_slack", "strict_defended_slack")
    values = {
        example: without_nan(dict(zip(names, row, strict=True)))
        for example, *row in zip(batch.examples.ids, *columns, strict=True)
    }
    if batch.replies is not None and batch.examples.dialogue is not None:
        served = set(batch.examples.dialogue.served)
        for row, (example, under) in enumerate(zip(batch.examples.ids, batch.replies, strict=True)):
            values[example]["answered"] = row in served
            values[example]["refused"] = refusal.opens_with_refusal(under)
    for example, text in zip(batch.examples.ids, batch.examples.texts or (), strict=False):
        values[example]["text"] = text
    return Done(values)


def solvers_for(bench: Bench, names: Sequence[str]) -> dict[str, Solver]:
    """The solvers of the search for these examples, in order; random draws follow from the seed and each name."""
    keys = [random.Random(f"{bench.schedule.seed}:{name}").getrandbits(48) for name in names]
    return {**SOLVERS, "random": partial(random_draws, draws=bench.plan.random_draws, keys=keys)}


def search(bench: Bench, batch: Batch, deltas: Deltas, progress: BatchProgress) -> Done:
    """The worst case over the solvers, and its deltas."""
    target, flips = bench.objective(batch.target), len(batch.flips)
    solvers = solvers_for(bench, batch.flip_ids)
    space, tell = bench.feasible(target), lambda _, left: progress(flips - left, flips)
    found = worst_case(target, target.zero_delta, space, bench.budget, bench.schedule, solvers, on_solver=tell)
    nearest = found.smallest
    if isinstance(target, Pinned):
        # Of a pinned delta the corrections count as well, of which the solvers do not know.
        nearest = shorten(target, nearest)
        frees = (found.delta, *(further * nearest for further in FURTHER))
        tries = [target.within(free, bench.budget * ROUNDED) for free in frees]
        kept = first_reaching(target, tries, bench.schedule.goal)
        found = replace(found, delta=kept.delta, score=kept.score, slack=kept.slack)
    within, smallest = (one.cpu() for one in bench.whole(batch.flipped, target, found.delta, nearest))
    saved = dict(zip(batch.flip_ids, within, strict=True))
    saved |= {f"{example}{SMALLEST}": delta for example, delta in zip(batch.flip_ids, smallest, strict=True)}
    return Done(_by_id(batch, "search", search_values(found)), saved)


def certificates(bench: Bench, batch: Batch, deltas: Deltas, progress: BatchProgress) -> Done:
    """Both deltas of each flip, replayed; and what the model says under the one within the budget."""
    within, smallest = (
        [deltas.delta(f"{name}{suffix}").to(bench.model.device) for name in batch.flip_ids] for suffix in ("", SMALLEST)
    )
    facts = certificate_values(certified(bench, batch, within))
    kept = [{name: one[name] for name in KEPT} for one in certificate_values(certified(bench, batch, smallest))]
    values = {
        example: {"certificate": one, "smallest": other}
        for example, one, other in zip(batch.flip_ids, facts, kept, strict=True)
    }
    if batch.examples.dialogue is not None:
        for example, reply in zip(batch.flip_ids, spoken(bench, batch.flipped, torch.stack(within)), strict=True):
            values[example]["reply"] = reply
    return Done(values)


def attribution(bench: Bench, batch: Batch, deltas: Deltas, progress: BatchProgress) -> Done:
    """The effect of each part of the delta within the budget, as `recover.protocol.travel` counts it."""
    delta = torch.stack([deltas.delta(name) for name in batch.flip_ids]).to(bench.model.device)
    parts = attribute(batch.target, delta, points=travel.POINTS, views=travel.PARTS)
    said = None
    if batch.examples.dialogue is not None:
        said = {name: read_replies(bench, batch.flipped, parts.deltas[name]) for name in travel.SAID}
    return Done(_by_id(batch, "attribution", travel.part_values(parts, said)))


def undoing(bench: Bench, batch: Batch, deltas: Deltas, progress: BatchProgress) -> Done:
    """What the delta within the budget does downstream, as an `UndoingRecord`."""
    delta = torch.stack([deltas.delta(name) for name in batch.flip_ids]).to(bench.model.device)
    columns = {name: values.tolist() for name, values in vars(undoing_of(batch.target, delta)).items()}
    rows = range(len(batch.flip_ids))
    return Done(
        _by_id(batch, "undoing", [without_nan({name: one[row] for name, one in columns.items()}) for row in rows])
    )


def read_replies(bench: Bench, part: Examples, delta: Delta) -> list[refusal.ReplyReading]:
    """How the model's replies to these requests read, with the clamps and a delta live."""
    assert part.dialogue is not None
    replies = texts(bench.model.tokenizer, bench.said(part.dialogue, delta))
    return [refusal.read(reply, base) for reply, base in zip(replies, part.dialogue.texts, strict=True)]


def certified(bench: Bench, batch: Batch, saved: list[Tensor]) -> Certificate:
    """Certify one delta for each flip of the batch."""
    part = batch.flipped
    return certify(bench.exact, bench.defense, part.prompts, part.behavior, torch.stack(saved), bench.surface)


def spoken(bench: Bench, part: Examples, delta: Delta) -> list[dict[str, Any]]:
    """A `ReplyRecord` for each of these requests: how the reply under a delta reads, and what drifted along it."""
    dialogue = part.dialogue
    assert dialogue is not None
    said = bench.said(dialogue, delta)
    along = free_drift(bench.exact, dialogue.prompts, said, bench.defense, delta, bench.surface)
    read = zip(texts(bench.model.tokenizer, said), dialogue.texts, strict=True)
    replies: list[dict[str, Any]] = [asdict(refusal.read(reply, base)) for reply, base in read]
    for row, reply in enumerate(replies):
        reply["relative_drift"] = float(along.relative_drift[row])
        reply["preactivation_shift"] = float(along.preactivation_shift[row].max())
    return [without_nan(reply) for reply in replies]


def placebo(bench: Bench, batch: Batch, deltas: Deltas, progress: BatchProgress) -> Done:
    """The search for an unrelated target; where there is one."""
    if batch.examples.dialogue is not None:
        return _other_answers(bench, batch)
    behavior = bench.examples.behavior
    if not isinstance(behavior, Targeted):
        return Done({})
    drawn = placebo_targets(batch.target, batch.flip_ids, known_targets(behavior), bench.plan.seed)
    if drawn is None or not bool(drawn[1].any()):
        return Done({})
    tokens, there = drawn
    rows = there.nonzero().flatten()
    part = batch.target.select(rows)
    assert isinstance(part.behavior, Targeted)
    aimed = bench.objective(part.asking(part.behavior.retarget(tokens[rows])))
    ids = [batch.flip_ids[row] for row in rows.tolist()]
    return Done({name: {"placebo": one} for name, one in zip(ids, _compared(bench, aimed), strict=True)})


def _other_answers(bench: Bench, batch: Batch) -> Done:
    """Search for the answer to another request, drawn from the seed and the example's id."""
    dialogue = bench.examples.dialogue
    assert dialogue is not None
    others = []
    for example in batch.flip_ids:
        own = bench.examples.ids.index(example)
        unlike = [row for row in dialogue.served if dialogue.texts[row] != dialogue.texts[own]]
        if not unlike:
            return Done({})
        others.append(random.Random(f"{bench.plan.seed}:{example}").choice(unlike))
    aimed = bench.objective(bench.defended(batch.flipped.answered_as(dialogue.select(others))))
    return Done(_by_id(batch, "placebo", _compared(bench, aimed)))


def write_orthogonal(bench: Bench, batch: Batch, deltas: Deltas, progress: BatchProgress) -> Done:
    """The search for the behavior itself under C1+."""
    target = bench.objective(batch.target)
    return Done(_by_id(batch, "write_orthogonal", _compared(bench, target, write_orthogonal=True)))


def budgets(bench: Bench, batch: Batch, deltas: Deltas, progress: BatchProgress) -> Done:
    """A search at each budget of the curve; and at the budget one of twice the steps."""
    target, goal = bench.objective(batch.target), bench.schedule.goal
    feasible, schedule = bench.feasible(target), bench.schedule
    reached = {
        budget: (find_perturbation(target, target.zero_delta, feasible, budget, schedule).slack >= goal).tolist()
        for budget in curve_budgets(bench)
    }
    twice = replace(schedule, steps=2 * schedule.steps)
    longer = (find_perturbation(target, target.zero_delta, feasible, bench.budget, twice).slack >= goal).tolist()
    at = [{f"{budget:g}": values[row] for budget, values in reached.items()} for row in range(len(longer))]
    found = [{"reached_at": one, "longer": more} for one, more in zip(at, longer, strict=True)]
    return Done(dict(zip(batch.flip_ids, found, strict=True)))


def undefended(bench: Bench, batch: Batch, deltas: Deltas, progress: BatchProgress) -> Done:
    """A search with the clamp off and nothing held, from where the clamp of the first site would have put the state."""
    target = batch.target.entered_at(bench.surface.first)
    objective, start = Undefended.of(target), displacement(target)
    reach = longest(start) * (1 + 1e-3)
    found = find_perturbation(objective, start, Anywhere(), reach, bench.schedule)
    found = reexamined(objective, found, Anywhere(), reach, bench.schedule)
    back = (found.slack > 0).tolist()
    return Done({example: {"undefended": back[row]} for row, example in enumerate(batch.flip_ids)})


_IN_ORDER: tuple[Phase, ...] = (
    *(search, certificates, attribution, undoing),
    *(placebo, write_orthogonal, budgets, undefended),
)
PHASES: Mapping[str, Phase] = {phase.__name__: phase for phase in _IN_ORDER}
"""The phases over valid flips, in order."""


def curve_budgets(bench: Bench) -> list[float]:
    """The budgets of the curve, smallest first."""
    return sorted({share * bench.budget for share in bench.plan.curve})


def _compared(bench: Bench, target: Defended | Pinned, *, write_orthogonal: bool = False) -> list[dict[str, Any]]:
    """A `PlaceboRecord` for each example of a search that is held against the main one."""
    with torch.no_grad():
        slack = target(target.zero_delta)[1].tolist()
    feasible = bench.feasible(target, write_orthogonal=write_orthogonal)
    found: WorstCase = worst_case(target, target.zero_delta, feasible, bench.budget, bench.schedule, BY_GRADIENT)
    sizes = [min(float(norms[row]) for norms in found.by_solver.values()) for row in range(len(slack))]
    pairs = zip(slack, sizes, strict=True)
    return [without_nan({"slack": at, "smallest": size, "within": size <= bench.budget}) for at, size in pairs]


def _by_id(batch: Batch, name: str, values: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {example: {name: one} for example, one in zip(batch.flip_ids, values, strict=True)}
