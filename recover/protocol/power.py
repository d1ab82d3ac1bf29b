"""The power of the search: is it able to find what it did not find?

1. *When*. No valid flip came back, and no gate has shown the search to be broken.
2. *Where*. As many routes of each kind as the plan says are spread over the flips that something is admissible on, in
   the model and under the defense that are checked (`recover.search.planted_routes`).
3. *How*. The solvers of the main search, at its budget and under its constraint, look for each of them; a solver is
   asked only for what those before it did not find.
4. *Found* is a route that is open at the delta that they give, within the budget. Where deltas are pinned, a route is
   planted on their free parts, at a length whose whole is at the share of the budget, corrections included.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import torch

from recover.numerics.metrics import by_example, norm
from recover.protocol.bench import Batch, Bench
from recover.protocol.gates import recovered, search_gates
from recover.protocol.phases import ROUNDED, BatchProgress, Done, solvers_for
from recover.protocol.records import ExampleRecord
from recover.search.ascent import Status
from recover.search.constraints.pinned import Pinned
from recover.search.planted_routes import ROUTE_KINDS, Route, Routed, RouteKind, plant, routes_found
from recover.search.solvers import Solver
from recover.types import Bool, Delta, PerExample, Rows, Tensor

SHARE = 0.75
"""The smallest norm of a planted route, as a share of the budget."""
GOALS = 10
"""A route's slack is at least as many times the goal of the search where the example's own slack is smaller."""


def trials(bench: Bench, records: Sequence[ExampleRecord]) -> dict[str, int]:
    """How many routes of each kind to plant into which examples, by id; none where there is nothing to ask."""
    searched = [r for r in records if r.search is not None and r.certificate is not None]
    some = [r.id for r in searched if r.search is not None and r.search.status != Status.NOTHING_ADMISSIBLE.name]
    if not some or not bench.plan.planted_routes or any(map(recovered, searched)):
        return {}
    dtype = str(bench.model.dtype).removeprefix("torch.")
    if any(gate.passed is False and gate.decides for gate in search_gates(searched, bench.budget, dtype)):
        return {}
    n, count = bench.plan.planted_routes, len(some)
    at = [some[trial * count // n] if n < count else some[trial % count] for trial in range(n)]
    return {name: at.count(name) for name in dict.fromkeys(at)}


def power(bench: Bench, batch: Batch, planted: Mapping[str, int], progress: BatchProgress) -> Done:
    """For each example of the batch that routes are planted into, whether each was found, by kind.

    Args:
        bench: the bench.
        batch: some of its examples.
        planted: how many routes of each kind, by example.
        progress: as of any phase.
    """
    each = [(row, number) for row, name in enumerate(batch.flip_ids) for number in range(planted.get(name, 0))]
    values = {batch.flip_ids[row]: {str(kind): list[bool]() for kind in ROUTE_KINDS} for row, _ in each}
    chunks = [each[at : at + bench.batch_size] for at in range(0, len(each), bench.batch_size)]
    for done, kind in enumerate(ROUTE_KINDS):
        for chunk in chunks:
            for (row, _), hit in zip(chunk, _found(bench, batch, kind, chunk).tolist(), strict=True):
                values[batch.flip_ids[row]][kind].append(hit)
        progress((done + 1) * len(values) // len(ROUTE_KINDS), len(values))
    return Done(values)


def _found(bench: Bench, batch: Batch, kind: RouteKind, chunk: Sequence[tuple[int, int]]) -> Bool[Tensor, "batch"]:
    """Which of these routes the search finds; each is an example of the batch and the number of its route."""
    names = [f"{batch.flip_ids[row]}:{number}" for row, number in chunk]
    at = torch.tensor([row for row, _ in chunk], device=bench.model.device)
    whole = bench.objective(batch.target)
    target, space, goal = whole.select(at), bench.feasible(whole).select(at), bench.schedule.goal
    zero = target.zero_delta
    with torch.no_grad():
        height = target(zero)[1].abs().clamp(min=GOALS * goal)

    def size(direction: Delta) -> PerExample:
        free = by_example(torch.full_like(height, SHARE * bench.budget)) * direction
        return norm(target.within(free, SHARE * bench.budget) if isinstance(target, Pinned) else free)

    route = plant(kind, zero, space, seeds=[_seed(bench, kind, name) for name in names], size=size, height=height)

    def solvers(rows: Rows) -> dict[str, Solver]:
        return solvers_for(bench, [names[row] for row in rows.tolist()])

    found = routes_found(Routed(target, route), zero, space, bench.budget, bench.schedule, solvers)
    delta = found.delta
    if isinstance(target, Pinned):
        delta = target.within(delta, bench.budget * ROUNDED)
    return _open(route, delta)


def _open(route: Route, delta: Delta) -> Bool[Tensor, "batch"]:
    with torch.no_grad():
        return route.slack(delta) > 0


def _seed(bench: Bench, kind: RouteKind, name: str) -> int:
    return random.Random(f"{bench.plan.seed}:{kind}:{name}").getrandbits(48)
