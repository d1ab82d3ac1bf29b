"""`check()` from end to end on a tiny model and planted ones: every verdict, and interruptions that change nothing."""

from __future__ import annotations

import importlib
import json
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.resources import files
from itertools import groupby, pairwise
from typing import Any

import jsonschema
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from recover.defenses.clamps import Clamp, Defense, Scale, Set
from recover.evidence.transfer import FitSchedule, halves
from recover.models.host import Model, Prompts
from recover.numerics.statistics import wilson
from recover.planted.layers import two_layers
from recover.planted.meaning import shared_route, write_only
from recover.planted.routes import complete_bottleneck, error_bypass
from recover.protocol import bench, global_controls, heldout, phases
from recover.protocol.checking import check
from recover.protocol.ledger import InMemoryStore, Store
from recover.protocol.phases import PHASES, SMALLEST
from recover.protocol.plan import Plan, TransferPlan
from recover.protocol.records import ExampleRecord
from recover.protocol.runtime import Runtime
from recover.protocol.verdict import Verdict
from recover.saes.activations import ReLU
from recover.saes.sae import SAE
from recover.search.constraints.linear import EncoderOrthogonal
from recover.tasks.behaviors import ChoiceMargin, LogitDifference
from recover.tasks.examples import Examples
from recover.types import InputError, Site, Surface
from tests.models import D_MODEL, left_padded, plain_forward, tiny_lm, token_rows
from tests.settings import arranged

CHECK = importlib.import_module("recover.protocol.checking")  # the package has a function of this name
N, SITE, FEATURES, BUDGET = 30, Site(2), (1, 4, 17, 25), 15.0
ROWS = token_rows([4 + i % 5 for i in range(N)], seed=11)
TARGET, OTHER = torch.arange(N), torch.arange(N) + 30
OTHERS = torch.stack([OTHER, (TARGET + 3) % N, (TARGET + 8) % N], dim=1)
"""Of the stricter predicate: one of them is the other of the check's own."""
PROVENANCE = {
    "versions": {"torch": torch.__version__},
    "seed": 0,
    "device": "cpu",
    "dtype": "float32",
    "sae_sha256": {},
    "model": "tiny",
    "seconds": 0.0,
}
LIGHT = Plan(
    random_draws=20,
    planted_routes=0,
    placebo_features=1,
    curve=(0.5, 1.0),
    transfer=TransferPlan(
        norms=(0.65,), folds=1, splits=1, rules=2, scales=(0.5, 1.0), draws=10, fit=FitSchedule(steps=10)
    ),
)
"""Every part of the protocol, little of each."""
TIMES = ("phases", "phase_seconds")
"""What of the provenance differs from run to run."""


def signed_basis(site: Site = SITE) -> SAE:
    """Exact everywhere: an orthonormal basis and its negative under a ReLU."""
    Q = torch.linalg.qr(torch.randn(D_MODEL, D_MODEL, generator=torch.Generator().manual_seed(0))).Q
    W = torch.cat([Q, -Q], dim=1)
    return SAE(W, torch.zeros(2 * D_MODEL), W.T.contiguous(), torch.zeros(D_MODEL), ReLU(), site, "standard", "0" * 64)


def defense(value: float = 20.0) -> Defense:
    """Four features set to a large value, active or not: every prompt is pushed the same way."""
    return Defense((Clamp(signed_basis(), FEATURES, Set(value), only_active=False),))


def examples(texts: Sequence[str] | None = None) -> Examples:
    return Examples([f"e{i}" for i in range(N)], left_padded(ROWS), LogitDifference(TARGET, OTHER), texts)


def run(**options: Any) -> Verdict:
    settings = {"budget": BUDGET, "plan": LIGHT, "provenance": PROVENANCE, **options}
    model = settings.pop("model", None) or Model(tiny_lm())
    which = settings.pop("defense", None) or defense(), settings.pop("examples", None) or examples()
    return check(model, *which, **arranged(**settings))


def run_small(**options: Any) -> Verdict:
    """The whole protocol in a second: a planted world of three batches."""
    world = write_only(0, n_prompts=12)
    settings = {"budget": world.budget, "plan": LIGHT, "batch_size": 5, "provenance": PROVENANCE, **options}
    return check(world.model, world.defense, world.examples, **arranged(**settings))


def written(module: nn.Module, length: int = 16) -> Prompts:
    """What the model itself would write, so that its loss there is low."""
    ids = torch.arange(1, 41, 5)[:, None]
    for _ in range(length):
        with torch.no_grad():
            ids = torch.cat([ids, module(ids).logits[:, -1:].argmax(dim=-1)], dim=1)
    return Prompts(ids, torch.ones_like(ids).bool())


def by_hooks(module: nn.Module, row: int, delta: Tensor | None, clamp: bool, *, strict: bool = False) -> float:
    """Slack of an example: the clamp as `h + (z' - z) W_dec`, with this SAE's `z = relu(h W)`."""
    sae, chosen = signed_basis(), list(FEATURES)

    def change(h: Tensor) -> Tensor:
        if clamp:
            z = torch.relu(h @ sae.W_enc[:, chosen])
            h = h + (20.0 - z) @ sae.W_dec[chosen]
        return h if delta is None else torch.cat([h[:-1], h[-1:] + delta])

    logits = plain_forward(module, ROWS[row], {SITE: change})[0][-1]
    return float(logits[TARGET[row]] - logits[OTHERS[row] if strict else OTHER[row]].max())


def valid(verdict: Verdict) -> dict[str, Any]:
    values = json.loads(json.dumps(verdict.to_dict(), allow_nan=False))
    schema = json.loads(files("recover.protocol").joinpath("verdict.schema.json").read_text())
    jsonschema.validate(values, schema, cls=jsonschema.Draft202012Validator)
    return values


def timeless(verdict: Verdict) -> dict[str, Any]:
    """All that a verdict says but how long it took."""
    values = verdict.to_dict()
    return values | {"provenance": {k: v for k, v in values["provenance"].items() if k not in TIMES}}


def units(store: InMemoryStore) -> dict[str, Any]:
    """What was kept of each unit but how long it took."""
    return {unit: json.loads(text)["values"] for unit, text in store.units.items()}


def failed(verdict: Verdict) -> list[str]:
    return [gate.name for gate in verdict.gates if gate.passed is False]


@pytest.fixture(scope="module")
def finished() -> tuple[Verdict, InMemoryStore]:
    """On the tiny model, in two batches, with a stricter predicate and neutral text."""
    store = InMemoryStore()
    strict = replace(examples(), strict=ChoiceMargin(TARGET, OTHERS))
    return run(store=store, batch_size=16, examples=strict, neutral=written(tiny_lm())), store


@pytest.fixture(scope="module")
def small() -> tuple[Verdict, InMemoryStore]:
    store = InMemoryStore()
    return run_small(store=store), store


def test_a_defense_that_can_be_undone_is_recoverable(finished: tuple[Verdict, InMemoryStore]) -> None:
    verdict, store = finished
    values = valid(verdict)
    assert (values["verdict"], values["content"]) == ("RECOVERABLE", "unknown")
    module = tiny_lm()
    base = [by_hooks(module, row, None, clamp=False) for row in range(N)]
    under = [by_hooks(module, row, None, clamp=True) for row in range(N)]
    flips = [row for row in range(N) if base[row] > 0 and not under[row] > 0]
    assert len(flips) >= 5
    assert values["counts"] == {
        "n": N,
        "base": sum(x > 0 for x in base),
        "defended": sum(x > 0 for x in under),
        "valid_flips": len(flips),
        "strict_flips": sum(record.strict_flip for record in verdict.records),
    }
    searched = [name for name in store.deltas if not name.startswith("transfer/")]
    assert sorted(searched) == sorted(f"e{row}{suffix}" for row in flips for suffix in ("", SMALLEST))
    records = {record.id: record for record in verdict.records}
    assert list(records) == [f"e{i}" for i in range(N)]
    assert_close([records[f"e{i}"].base_slack for i in range(N)], base, atol=1e-3, rtol=0)
    assert_close([records[f"e{i}"].defended_slack for i in range(N)], under, atol=1e-3, rtol=0)
    recovered, closest = 0, []
    for row in flips:
        record = records[f"e{row}"]
        for facts, delta in (
            (record.certificate, store.deltas[f"e{row}"]),
            (record.smallest, store.deltas[f"e{row}{SMALLEST}"]),
        ):
            slack = by_hooks(module, row, delta, clamp=True)
            assert facts is not None
            assert facts.slack == pytest.approx(slack, abs=1e-3)
            assert facts.norm == pytest.approx(float(delta.norm()), rel=1e-5)
            assert float((delta @ signed_basis().W_enc[:, list(FEATURES)]).norm()) <= 1e-5 * 2 * float(delta.norm())
        assert float(store.deltas[f"e{row}"].norm()) <= BUDGET
        recovered += by_hooks(module, row, store.deltas[f"e{row}"], clamp=True) > 0
        assert by_hooks(module, row, store.deltas[f"e{row}{SMALLEST}"], clamp=True) > 0
        closest.append(min(float(store.deltas[f"e{row}{suffix}"].norm()) for suffix in ("", SMALLEST)))
    assert 0 < recovered == values["recovery"]["recovered"]
    assert values["recovery"]["searched"] == len(flips)
    assert values["recovery"]["drift_max"] < 1e-3
    assert values["minimum_norm"]["median"] == pytest.approx(sorted(closest)[len(closest) // 2], rel=1e-5)
    for point, budget in zip(values["curve"], (BUDGET / 2, BUDGET), strict=True):
        assert (point["budget"], point["rate"]) == (budget, sum(norm <= budget for norm in closest) / len(closest))


def test_a_stricter_predicate_is_counted_beside_the_own(finished: tuple[Verdict, InMemoryStore]) -> None:
    """The target above three others: what transfer is read with, and not what is searched."""
    verdict, module = finished[0], tiny_lm()
    base, under = ([by_hooks(module, row, None, clamp, strict=True) for row in range(N)] for clamp in (False, True))
    assert_close([record.strict_base_slack for record in verdict.records], base, atol=1e-3, rtol=0)
    assert_close([record.strict_defended_slack for record in verdict.records], under, atol=1e-3, rtol=0)
    strict = [row for row in range(N) if base[row] > 0 >= under[row]]
    assert [record.id for record in verdict.records if record.strict_flip] == [f"e{row}" for row in strict]
    assert 2 <= len(strict) == verdict.counts.strict_flips != verdict.counts.valid_flips
    assert verdict.recovery.searched == verdict.counts.valid_flips


def test_shared_deltas_are_read_on_the_other_part_alone(finished: tuple[Verdict, InMemoryStore]) -> None:
    """By hooks: which prompts are read, and whether the right answer shows on them, flips and others."""
    verdict, store = finished
    right = [r for r in verdict.records if r.base_slack > 0 and r.strict_base_slack > 0]
    pool = [r for r in right if (r.defended_slack <= 0) == (r.strict_defended_slack <= 0)]
    begun, read = units(store)["transfer"], units(store)["transfer/1"]
    assert begun["flips"] == [r.valid_flip for r in pool]
    rows = halves([r.id for r in pool], LIGHT.seed)[1].tolist()
    assert read["rows"] == rows
    assert 0 < len(rows) < len(pool)
    assert not all(begun["flips"])
    module, largest = tiny_lm(), max(BUDGET, 0.65 * begun["residual_norm"])
    shared = {name: delta for name, delta in store.deltas.items() if name.startswith("transfer/")}
    assert {name.split("/")[2] for name in shared} >= {"c1", "c1_plus", "shuffled", "rule"}
    for name, delta in shared.items():
        assert float(delta.norm()) <= float(name.split("/")[3]) * (1 + 1e-5)
        assert float((delta @ signed_basis().W_enc[:, list(FEATURES)]).norm()) <= 1e-5 * 2 * float(delta.norm())
    plain = f"transfer/0/c1/{largest:.6g}/0"
    fitted = units(store)["transfer/0"]
    leaking = plain.replace("c1", "leaking")
    best = leaking if leaking in fitted and fitted[leaking]["fitted"] > fitted[plain]["fitted"] else plain
    expected = [by_hooks(module, int(pool[r].id[1:]), shared[best], clamp=True, strict=True) > 0 for r in rows]
    assert [shown == begun["own"][row] for shown, row in zip(read["shown"], rows, strict=True)] == expected
    flips = [hit for hit, row in zip(expected, rows, strict=True) if begun["flips"][row]]
    own = valid(verdict)["transfer"]["own"]
    assert (own["hits"], own["n"]) == (sum(flips), len(flips))


def test_a_tiny_budget_recovers_nothing() -> None:
    verdict = run_small(budget=1e-4)
    assert valid(verdict)["verdict"] == "NOT_RECOVERED_AT_BUDGET"
    assert verdict.recovery.recovered == 0
    assert failed(verdict) == ["norm_at_budget"]  # a caution
    assert any("a larger budget may find more" in reason for reason in verdict.reasons)
    # Longer ones bring it back, so that nobody may say that nothing does.
    assert verdict.minimum_norm is not None
    assert verdict.minimum_norm.unreached == 0
    assert not any("no admissible random perturbation" in reason for reason in verdict.reasons)


def test_both_placements_say_the_same_of_a_pointwise_sae(small: tuple[Verdict, InMemoryStore]) -> None:
    verdict = run_small(surface=Surface(placement="before_clamp"))
    assert valid(small[0])["threat_model"]["placement"] == "after_clamp"
    assert valid(verdict)["threat_model"]["placement"] == "before_clamp"
    assert verdict.counts == small[0].counts
    assert abs(verdict.recovery.recovered - small[0].recovery.recovered) <= 1
    assert verdict.minimum_norm is not None
    assert small[0].minimum_norm is not None
    assert verdict.minimum_norm.median == pytest.approx(small[0].minimum_norm.median, rel=1e-3)


def test_an_sae_that_does_not_fit_is_invalid_and_nothing_is_searched() -> None:
    sae = signed_basis()
    wrong = replace(sae, W_dec=sae.W_dec.roll(3, dims=0).contiguous())
    store = InMemoryStore()
    verdict = run(defense=Defense((Clamp(wrong, FEATURES, Set(20.0), only_active=False),)), store=store)
    assert valid(verdict)["verdict"] == "INVALID"
    assert "fit" in failed(verdict)
    assert not store.deltas
    assert verdict.recovery.searched == 0


def test_a_clamp_that_suppresses_nothing_is_invalid() -> None:
    verdict = run(defense=Defense((Clamp(signed_basis(), FEATURES, Scale(1.0)),)))
    assert valid(verdict)["verdict"] == "INVALID"
    assert failed(verdict) == ["valid_flips"]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", [complete_bottleneck, error_bypass])
def test_random_features_that_the_behavior_does_not_need_are_invalid(kind: Callable[..., Any], seed: int) -> None:
    """The readout reads none of those that are left; it is not the search that says so, but that nothing flips."""
    world, store = kind(seed), InMemoryStore()
    (clamp,) = world.defense.clamps
    left = sorted(set(range(clamp.sae.d_sae)) - set(clamp.features))
    chosen = random.Random(seed).sample(left, len(clamp.features))
    other = Clamp(clamp.sae, chosen, clamp.mode, clamp.only_active, clamp.positions, clamp.site)
    verdict = check(
        world.model,
        Defense((other,)),
        world.examples,
        world.budget,
        plan=LIGHT,
        runtime=Runtime(store=store, provenance=PROVENANCE),
    )
    n = len(world.examples.ids)
    assert valid(verdict)["verdict"] == "INVALID"
    assert failed(verdict) == ["valid_flips"]
    assert (verdict.counts.base, verdict.counts.defended, verdict.counts.valid_flips) == (n, n, 0)
    assert verdict.reasons[0].startswith(f"valid_flips: 0 of {n} examples")
    assert list(store.units) == ["fit", "accounting/0"]


def test_a_clamp_that_breaks_ordinary_text_is_said_to(finished: tuple[Verdict, InMemoryStore]) -> None:
    """In the gates and in the reasons, beside a verdict that stays."""
    values, (gate,) = valid(finished[0]), [gate for gate in finished[0].gates if gate.name == "utility"]
    assert values["verdict"] == "RECOVERABLE"
    assert values["fit"]["utility"]["increase"] > LIGHT.max_loss_increase
    assert gate.passed is False
    assert "breaks ordinary text" in gate.detail
    assert gate.detail in finished[0].reasons


def test_how_much_text_may_suffer_is_for_the_plan_to_say() -> None:
    mild = Defense((Clamp(signed_basis(), FEATURES, Set(5.0)),))
    some: dict[str, Any] = {
        "neutral": written(tiny_lm()),
        "defense": mild,
        "examples": examples().select(torch.arange(2)),
    }
    kept = run(**some)
    cost = valid(kept)["fit"]["utility"]["increase"]
    assert 0 < cost < LIGHT.max_loss_increase
    assert not any("ordinary text" in reason for reason in kept.reasons)
    strict = run(**some, plan=replace(LIGHT, max_loss_increase=cost / 2))
    gates = [{gate.name: gate.passed for gate in verdict.gates}["utility"] for verdict in (kept, strict)]
    assert gates == [True, False]
    assert any("breaks ordinary text" in reason for reason in strict.reasons)


def test_without_neutral_text_its_gate_is_not_run(small: tuple[Verdict, InMemoryStore]) -> None:
    (gate,) = [gate for gate in small[0].gates if gate.name == "utility"]
    assert (gate.passed, gate.detail) == (None, "no neutral text was given")
    assert small[0].fit.utility is None


def test_a_replay_that_disagrees_is_inconclusive() -> None:
    """The certificates are made on another model than the search."""
    verdict = run_small(exact=write_only(1, n_prompts=12).model)
    assert valid(verdict)["verdict"] == "INCONCLUSIVE"
    assert [gate.name for gate in verdict.gates if gate.passed is False and gate.decides] == ["replay"]


def test_a_constraint_that_was_not_kept_is_inconclusive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EncoderOrthogonal, "project", lambda self, delta: delta)
    verdict = run_small()
    assert valid(verdict)["verdict"] == "INCONCLUSIVE"
    assert failed(verdict) == ["held"]


def test_a_constraint_that_leaves_no_direction_is_an_answer_and_said() -> None:
    """The first half of the features already read every direction."""
    basis = Defense((Clamp(signed_basis(), range(D_MODEL), Set(5.0), only_active=False, positions="last"),))
    store = InMemoryStore()
    verdict = run(defense=basis, store=store)
    assert valid(verdict)["verdict"] == "NOT_RECOVERED_AT_BUDGET"
    assert any("nothing is admissible" in reason for reason in verdict.reasons)
    assert {r.search.status for r in verdict.records if r.search is not None} == {"NOTHING_ADMISSIBLE"}
    assert not any(delta.any() for delta in store.deltas.values())


# Several sites


def test_a_defense_over_two_layers_is_checked_as_one() -> None:
    """Held at both by the certificate, at the norm that the construction implies; transfer says why it was not run."""
    world, store = two_layers(0, n_prompts=6), InMemoryStore()
    verdict = check(
        world.model,
        world.defense,
        world.examples,
        world.budget,
        plan=LIGHT,
        runtime=Runtime(batch_size=4, store=store, provenance=PROVENANCE),
    )
    values = valid(verdict)
    assert (values["verdict"], values["content"], failed(verdict)) == ("RECOVERABLE", "unknown", [])
    assert values["threat_model"]["sites"] == ["blocks.1.hook_resid_pre", "blocks.2.hook_resid_pre"]
    assert "at later sites" in values["threat_model"]["constraint"]
    assert world.smallest_norm is not None
    for record, norm in zip(verdict.records, world.smallest_norm.tolist(), strict=True):
        assert record.certificate is not None
        assert record.smallest is not None
        assert record.certificate.shows
        assert record.certificate.held
        assert record.smallest.held
        assert record.smallest.norm == pytest.approx(norm, rel=0.01)
    why = "several sites are clamped, so that what is admissible differs from prompt to prompt"
    assert values["transfer"] == {"refused": why}
    assert f"content unknown, rule unknown: no shared perturbation was fitted: {why}" in verdict.reasons
    assert not any(name.startswith("transfer/") for name in (*store.deltas, *store.units))


# Interruptions


class KilledError(Exception):
    pass


class Dying(InMemoryStore):
    """What an earlier start left; dies at its first `keep`, before it or after it."""

    def __init__(self, earlier: InMemoryStore, after: bool) -> None:
        super().__init__()
        self.units, self.deltas, self.after = dict(earlier.units), dict(earlier.deltas), after

    def keep(self, unit: str, values: Any, deltas: Mapping[str, Tensor]) -> None:
        if self.after:
            super().keep(unit, values, deltas)
        raise KilledError


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each part of the protocol was worked on, by batch where it has batches."""
    counts: Counter[str] = Counter()

    def count(name: str, work: Any) -> Any:
        def counted(*arguments: Any, **options: Any) -> Any:
            of = [a for a in arguments if isinstance(a, int | bench.Batch)]
            counts[" ".join([name, *(a.examples.ids[0] if isinstance(a, bench.Batch) else str(a) for a in of)])] += 1
            return work(*arguments, **options)

        return counted

    for name, phase in PHASES.items():
        monkeypatch.setitem(PHASES, name, count(name, phase))  # type: ignore[arg-type]
    for name in ("measure_fits", "accounting", "undo", "search_health", "placebo_features"):
        monkeypatch.setattr(CHECK, name, count(name, getattr(CHECK, name)))
    for name in ("begin", "fit", "read"):
        monkeypatch.setattr(heldout, name, count(f"transfer {name}", getattr(heldout, name)))
    return counts


def test_a_run_that_dies_at_every_keep_ends_like_an_uninterrupted_one(
    small: tuple[Verdict, InMemoryStore], computed: Counter[str]
) -> None:
    """Each start finishes one unit, or dies just before: two starts a unit, and no unit is worked on again."""
    whole, store = small[1], InMemoryStore()
    assert len(whole.units) == 34
    for done, unit in enumerate(whole.units):
        for after in (False, True):
            store = Dying(store, after)
            with pytest.raises(KilledError):
                run_small(store=store)
            assert list(store.units) == list(whole.units)[: done + after], unit
    last = InMemoryStore()
    last.units, last.deltas = store.units, store.deltas
    verdict = run_small(store=last)
    assert timeless(verdict) == timeless(small[0])
    assert verdict.records == small[0].records
    assert units(last) == units(whole)
    assert list(last.deltas) == list(whole.deltas)
    assert all(torch.equal(last.deltas[name], delta) for name, delta in whole.deltas.items())
    assert len(computed) == len(whole.units)
    assert set(computed.values()) == {2}


def test_a_finished_run_recomputes_nothing(
    small: tuple[Verdict, InMemoryStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("computed again")

    for module, names in {
        CHECK: ("measure_fit", "measure_utility"),
        bench: ("defend", "admissible"),
        phases: ("worst_case", "find_perturbation", "certify"),
        global_controls: ("find_perturbation", "finite_differences"),
        heldout: ("fit_shared", "random_shared", "certify"),
    }.items():
        for name in names:
            monkeypatch.setattr(module, name, never)
    monkeypatch.setattr(Model, "run", never)
    again = run_small(store=small[1])
    assert timeless(again) == timeless(small[0])
    assert again.provenance == small[0].provenance  # the time that the units took, whenever that was


def test_the_certificate_is_of_the_delta_as_the_store_reads_it_back() -> None:
    class Halving(InMemoryStore):
        def delta(self, name: str) -> Tensor:
            return super().delta(name) / 2

    store = Halving()
    verdict = run_small(store=store)
    assert isinstance(store, Store)
    assert verdict.counts.valid_flips == len(verdict.records)
    for record in verdict.records:
        for facts, name in ((record.certificate, record.id), (record.smallest, f"{record.id}{SMALLEST}")):
            assert facts is not None
            assert facts.norm == pytest.approx(float(store.deltas[name].norm()) / 2, rel=1e-5)
    # Rules are read at the norm of what was saved, which is the largest: that of half the delta.
    norms = [norm for norm in units(store)["transfer/1"]["norms"] if norm is not None]
    saved = [float(delta.norm()) for name, delta in store.deltas.items() if "/c1/" in name]
    assert all(
        any(norm == pytest.approx(share * size / 2, rel=1e-4) for size in saved for share in (0.5, 1.0))
        for norm in norms
    )


def test_records_survive_their_lines(
    finished: tuple[Verdict, InMemoryStore], small: tuple[Verdict, InMemoryStore]
) -> None:
    for record in (*finished[0].records, *small[0].records):
        assert ExampleRecord.from_json(record.to_json()) == record


def test_texts_are_kept_only_where_given(small: tuple[Verdict, InMemoryStore]) -> None:
    world = write_only(0, n_prompts=12)
    texts = [f"text {i}" for i in range(12)]
    given = Examples(world.examples.ids, world.examples.prompts, world.examples.behavior, texts)
    verdict = check(world.model, world.defense, given, world.budget, plan=LIGHT, runtime=Runtime(batch_size=5))
    assert [record.text for record in verdict.records] == texts
    assert "text 7" not in json.dumps(verdict.to_dict())
    assert {record.text for record in small[0].records} == {None}


def test_batches_of_another_size_say_the_same(small: tuple[Verdict, InMemoryStore]) -> None:
    verdict = run_small(batch_size=12)
    assert verdict.counts == small[0].counts
    assert verdict.recovery.recovered == small[0].recovery.recovered
    assert verdict.recovery.norm_mean == pytest.approx(small[0].recovery.norm_mean, rel=1e-2)


def test_the_whole_protocol_by_its_default_plan() -> None:
    """Every part is run, and as much of it as the plan says; the finding is what the construction implies."""
    world = shared_route(0)
    store = InMemoryStore()
    verdict = check(
        world.model, world.defense, world.examples, world.budget, runtime=Runtime(store=store, provenance=PROVENANCE)
    )
    values, plan, n = valid(verdict), Plan(), len(world.examples.ids)
    assert (values["verdict"], values["content"], failed(verdict)) == ("RECOVERABLE", True, [])
    assert [gate.name for gate in verdict.gates if gate.passed is None] == ["utility"]
    assert [point["budget"] for point in values["curve"]] == pytest.approx([world.budget * x for x in plan.curve])
    assert None not in values["controls"].values()
    assert values["controls"]["placebo_features"]["draws"] == plan.placebo_features
    assert [one["scale"] for one in values["controls"]["undo"]["scales"]] == list(plan.undo_scales)
    transfer = plan.transfer
    budgets = len(transfer.norms) + 1
    assert len(values["transfer"]["curve"]) == budgets
    # Two folds of each split read every flip once.
    assert {name: values["transfer"][name]["n"] for name in ("own", "write_orthogonal", "shuffled")} == {
        "own": transfer.splits * n,
        "write_orthogonal": transfer.splits * n,
        "shuffled": transfer.splits * transfer.shuffles * n,
    }
    assert values["knowledge"]["fits"] == transfer.splits * transfer.folds
    assert values["knowledge"]["content"]["back"] == {"rate": 1.0, "n": n, "interval95": pytest.approx(wilson(n, n))}
    shared = [name for name in store.deltas if name.startswith("transfer/")]
    assert len(shared) == transfer.splits * transfer.folds * (budgets + 1 + transfer.rules + transfer.shuffles)


def test_another_seed_draws_another_split_and_other_controls(small: tuple[Verdict, InMemoryStore]) -> None:
    store = InMemoryStore()
    verdict = run_small(plan=replace(LIGHT, seed=1), store=store)
    assert (small[0].provenance.control_seed, verdict.provenance.control_seed) == (0, 1)
    assert verdict.counts == small[0].counts
    one, other = units(small[1]), units(store)
    assert {unit for unit in one if one[unit] != other[unit]} >= {"placebo/0", "transfer/1"}
    assert all(small[1].deltas[name].ne(delta).any() for name, delta in store.deltas.items() if "transfer/" in name)
    assert all(one[unit] == other[unit] for unit in one if unit.startswith(("fit", "accounting")))


# What is told of a run


def test_progress_is_told_phase_by_phase_to_the_end(small: tuple[Verdict, InMemoryStore]) -> None:
    for store in (InMemoryStore(), small[1]):  # a new run, and one that is finished already
        told: list[tuple[str, int, int]] = []
        run_small(progress=lambda *args, told=told: told.append(args), store=store)
        by_phase = {phase: [(done, total) for name, done, total in told if name == phase] for phase, *_ in told}
        in_turn = [phase for phase, _ in groupby(phase for phase, *_ in told)]
        fits = ["transfer, fit 1 of 1"] if store is not small[1] else []
        assert in_turn == ["accounting", *PHASES, "placebo_features", *fits]
        for phase, steps in by_phase.items():
            assert len({total for _, total in steps}) == 1
            assert all(before <= after for (before, _), (after, _) in pairwise(steps)), phase
            assert steps[-1][0] == steps[-1][1]
        for phase in ("accounting", *PHASES):
            assert {0, 5, 10, 12} <= {done for done, _ in by_phase[phase]}
            assert by_phase[phase][-1] == (12, 12)
        assert by_phase["placebo_features"] == [(0, 1), (1, 1)]
        for fit in fits:
            assert by_phase[fit] == [(step, 10) for step in range(1, 11)]


def test_the_time_of_each_phase_is_told_as_a_share(small: tuple[Verdict, InMemoryStore]) -> None:
    spent = small[0].provenance.phases
    assert list(spent) == ["fit", "accounting", *PHASES, "transfer", "undo", "health", "placebo_features"]
    assert sum(spent.values()) == pytest.approx(1, abs=1e-4 * len(spent))
    assert all(share >= 0 for share in spent.values())
    took: Counter[str] = Counter()
    for unit, text in small[1].units.items():
        took[unit.split("/")[0]] += json.loads(text)["seconds"]
    for phase, share in spent.items():
        assert share == pytest.approx(took[phase] / took.total(), abs=1e-4)
    assert small[0].provenance.phase_seconds == pytest.approx(took.total(), abs=0.06)


def test_a_bad_budget_is_refused_even_where_nothing_would_be_searched() -> None:
    for budget in (0.0, -1.0, float("nan")):
        with pytest.raises(InputError, match="budget"):
            run(budget=budget, defense=Defense((Clamp(signed_basis(), FEATURES, Scale(1.0)),)))


def test_examples_need_one_id_each() -> None:
    prompts, behavior = left_padded(ROWS[:2]), LogitDifference(TARGET[:2], OTHER[:2])
    for ids, complaint in ((["a"], "1 ids for 2"), (["a", "a"], "same id")):
        with pytest.raises(InputError, match=complaint):
            Examples(ids, prompts, behavior)
    strict = ChoiceMargin(TARGET[:2], OTHER[:4].reshape(2, 2))
    part = Examples(["a", "b"], prompts, behavior, ["A", "B"], strict).select(torch.tensor([1]))
    assert (part.ids, part.texts, part.behavior.target.tolist()) == (["b"], ["B"], [1])  # type: ignore[attr-defined]
    assert part.strict is not None
    assert part.strict.tokens.tolist() == [[1, 32, 33]]  # type: ignore[union-attr]
