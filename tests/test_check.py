"""`check()` from end to end on a tiny model: every verdict, and interruptions that change nothing."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.resources import files
from typing import Any

import jsonschema
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from recover.activation import ReLU
from recover.behavior import LogitDifference
from recover.check import Examples, Memory, Store, check
from recover.clamp import Clamp, Defense, Scale, Set
from recover.constraint import EncoderOrthogonal
from recover.model import Model
from recover.records import ExampleRecord
from recover.sae import SAE
from recover.search import Schedule
from recover.types import InputError, Site
from recover.verdict import Verdict
from tests.models import D_MODEL, left_padded, plain_forward, tiny_lm, token_rows

CHECK = importlib.import_module("recover.check")  # the package has a function of this name
N, SITE, FEATURES, BUDGET = 30, Site(2), (1, 4, 17, 25), 15.0
ROWS = token_rows([4 + i % 5 for i in range(N)], seed=11)
TARGET, OTHER = torch.arange(N), torch.arange(N) + 30
PROVENANCE = {
    "versions": {"torch": torch.__version__},
    "seed": 0,
    "device": "cpu",
    "dtype": "float32",
    "sae_sha256": {},
    "model": "tiny",
    "seconds": 0.0,
}


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
    settings = {"budget": BUDGET, "batch_size": 8, "provenance": PROVENANCE, **options}
    model = settings.pop("model", None) or Model(tiny_lm())
    return check(
        model, settings.pop("defense", None) or defense(), settings.pop("examples", None) or examples(), **settings
    )


def by_hooks(module: nn.Module, row: int, delta: Tensor | None, clamp: bool) -> float:
    """Slack of an example: the clamp as `h + (z' - z) W_dec`, with this SAE's `z = relu(h W)`."""
    sae, chosen = signed_basis(), list(FEATURES)

    def change(h: Tensor) -> Tensor:
        if clamp:
            z = torch.relu(h @ sae.W_enc[:, chosen])
            h = h + (20.0 - z) @ sae.W_dec[chosen]
        return h if delta is None else torch.cat([h[:-1], h[-1:] + delta])

    logits = plain_forward(module, ROWS[row], {SITE: change})[0][-1]
    return float(logits[TARGET[row]] - logits[OTHER[row]])


def valid(verdict: Verdict) -> dict[str, Any]:
    values = json.loads(json.dumps(verdict.to_dict(), allow_nan=False))
    schema = json.loads(files("recover").joinpath("schemas/verdict.schema.json").read_text())
    jsonschema.validate(values, schema, cls=jsonschema.Draft202012Validator)
    return values


def failed(verdict: Verdict) -> list[str]:
    return [gate.name for gate in verdict.gates if gate.passed is False]


@pytest.fixture(scope="module")
def finished() -> tuple[Verdict, Memory]:
    store = Memory()
    return run(store=store), store


def test_a_defense_that_can_be_undone_is_recoverable(finished: tuple[Verdict, Memory]) -> None:
    verdict, store = finished
    values = valid(verdict)
    assert (values["verdict"], values["specific"]) == ("RECOVERABLE", "unknown")
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
    }
    assert list(store.deltas) == [f"e{row}" for row in flips]
    assert_close([store.records[f"e{i}"].base_slack for i in range(N)], base, atol=1e-3, rtol=0)
    assert_close([store.records[f"e{i}"].defended_slack for i in range(N)], under, atol=1e-3, rtol=0)
    recovered = 0
    for row in flips:
        record, delta = store.records[f"e{row}"], store.deltas[f"e{row}"]
        slack = by_hooks(module, row, delta, clamp=True)
        assert record.certificate is not None
        assert record.certificate["slack"] == pytest.approx(slack, abs=1e-3)
        assert record.certificate["norm"] == pytest.approx(float(delta.norm()), rel=1e-5)
        assert float(delta.norm()) <= BUDGET
        assert float((delta @ signed_basis().W_enc[:, list(FEATURES)]).norm()) <= 1e-5 * 2 * float(delta.norm())
        recovered += slack > 0
    assert 0 < recovered == values["recovery"]["recovered"]
    assert values["recovery"]["searched"] == len(flips)
    assert values["recovery"]["drift_max"] < 1e-3


def test_a_tiny_budget_recovers_nothing() -> None:
    verdict = run(budget=1e-4)
    assert valid(verdict)["verdict"] == "NOT_RECOVERED_AT_BUDGET"
    assert verdict.recovery["recovered"] == 0
    assert not failed(verdict)


@pytest.mark.parametrize("placement", ["before_clamp", "after_clamp"])
def test_both_placements_say_the_same_of_a_pointwise_sae(placement: Any, finished: tuple[Verdict, Memory]) -> None:
    verdict = run(placement=placement)
    assert valid(verdict)["threat_model"]["placement"] == placement
    assert verdict.counts == finished[0].counts
    assert abs(verdict.recovery["recovered"] - finished[0].recovery["recovered"]) <= 1


def test_an_sae_that_does_not_fit_is_invalid_and_nothing_is_searched() -> None:
    sae = signed_basis()
    wrong = replace(sae, W_dec=sae.W_dec.roll(3, dims=0).contiguous())
    store = Memory()
    verdict = run(defense=Defense((Clamp(wrong, FEATURES, Set(20.0), only_active=False),)), store=store)
    assert valid(verdict)["verdict"] == "INVALID"
    assert "fit" in failed(verdict)
    assert not store.deltas
    assert verdict.recovery["searched"] == 0


def test_a_clamp_that_suppresses_nothing_is_invalid() -> None:
    verdict = run(defense=Defense((Clamp(signed_basis(), FEATURES, Scale(1.0)),)))
    assert valid(verdict)["verdict"] == "INVALID"
    assert failed(verdict) == ["valid_flips"]


def test_a_replay_that_disagrees_is_inconclusive() -> None:
    """The certificates are made on another model than the search."""
    verdict = run(exact=Model(tiny_lm(seed=1)))
    assert valid(verdict)["verdict"] == "INCONCLUSIVE"
    assert failed(verdict) == ["replay"]


def test_a_constraint_that_was_not_kept_is_inconclusive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EncoderOrthogonal, "project", lambda self, delta: delta)
    verdict = run()
    assert valid(verdict)["verdict"] == "INCONCLUSIVE"
    assert failed(verdict) == ["held"]


def test_a_constraint_that_leaves_no_direction_is_an_answer_and_said() -> None:
    """The first half of the features already read every direction."""
    basis = Defense((Clamp(signed_basis(), range(D_MODEL), Set(5.0), only_active=False, positions="last"),))
    store = Memory()
    verdict = run(defense=basis, store=store)
    assert valid(verdict)["verdict"] == "NOT_RECOVERED_AT_BUDGET"
    assert any("nothing is admissible" in reason for reason in verdict.reasons)
    assert {r.search.status for r in store.records.values() if r.search is not None} == {"NOTHING_ADMISSIBLE"}
    assert not any(delta.any() for delta in store.deltas.values())


class KilledError(Exception):
    pass


class Failing(Memory):
    """A memory that dies after so many calls of one of its methods."""

    def __init__(self, method: str, after: int, before: bool) -> None:
        super().__init__()
        self.method, self.left, self.before = method, after, before

    def _count(self, method: str, act: Callable[[], None]) -> None:
        self.left -= method == self.method
        dying = method == self.method and self.left < 0
        if dying and self.before:
            raise KilledError
        act()
        if dying:
            raise KilledError

    def save_deltas(self, deltas: Mapping[str, Tensor]) -> None:
        self._count("save_deltas", lambda: super(Failing, self).save_deltas(deltas))

    def save(self, records: Sequence[ExampleRecord]) -> None:
        self._count("save", lambda: super(Failing, self).save(records))


@pytest.mark.parametrize("before", [True, False], ids=["before writing", "after writing"])
@pytest.mark.parametrize("after", [0, 1])
@pytest.mark.parametrize("method", ["save", "save_deltas"])
def test_an_interrupted_run_ends_like_an_uninterrupted_one(
    method: str, after: int, before: bool, finished: tuple[Verdict, Memory], monkeypatch: pytest.MonkeyPatch
) -> None:
    dying = Failing(method, after, before)
    with pytest.raises(KilledError):
        run(store=dying)
    store = Memory()
    store.records, store.deltas = dict(dying.records), dict(dying.deltas)
    done = set(store.records)
    assert len(done) == 8 * (after + (method == "save" and not before))

    seen: list[str] = []
    real = CHECK.defend

    def counting(model: Model, defense: Defense, prompts: Any, behavior: Any, **options: Any) -> Any:
        seen.extend(f"e{int(token)}" for token in behavior.target)
        return real(model, defense, prompts, behavior, **options)

    monkeypatch.setattr(CHECK, "defend", counting)
    verdict = run(store=store)
    assert verdict.to_dict() == finished[0].to_dict()
    assert seen == [f"e{i}" for i in range(N) if f"e{i}" not in done]
    assert store.records == finished[1].records
    assert all(torch.equal(store.deltas[name], delta) for name, delta in finished[1].deltas.items())


def test_a_finished_run_recomputes_nothing(finished: tuple[Verdict, Memory], monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("computed again")

    for name in ("defend", "recover", "certify"):
        monkeypatch.setattr(CHECK, name, never)
    assert run(store=finished[1]).to_dict() == finished[0].to_dict()


def test_the_certificate_is_of_the_delta_as_the_store_reads_it_back() -> None:
    class Halving(Memory):
        def delta(self, example: str) -> Tensor:
            return super().delta(example) / 2

    store = Halving()
    run(store=store)
    assert isinstance(store, Store)
    assert store.deltas
    for name, delta in store.deltas.items():
        facts = store.records[name].certificate
        assert facts is not None
        assert facts["norm"] == pytest.approx(float(delta.norm()) / 2, rel=1e-5)


def test_records_survive_their_lines(finished: tuple[Verdict, Memory]) -> None:
    for record in finished[1].records.values():
        assert ExampleRecord.from_json(record.to_json()) == record


def test_texts_are_kept_only_where_given() -> None:
    store = Memory()
    run(examples=examples([f"text {i}" for i in range(N)]), store=store, budget=1e-4)
    assert store.records["e7"].text == "text 7"
    assert "text" not in json.dumps(run(budget=1e-4).to_dict()["counts"])


def test_batches_of_another_size_say_the_same(finished: tuple[Verdict, Memory]) -> None:
    verdict = run(batch_size=30)
    assert verdict.counts == finished[0].counts
    assert verdict.recovery["recovered"] == finished[0].recovery["recovered"]
    assert verdict.recovery["norm_mean"] == pytest.approx(finished[0].recovery["norm_mean"], rel=1e-2)


def test_progress_is_told_to_the_end() -> None:
    told: list[tuple[str, int, int]] = []
    run(progress=lambda *args: told.append(args), schedule=Schedule(steps=2, restarts=0))
    assert [done for phase, done, _ in told if phase == "examples"][-4:] == [8, 16, 24, 30]
    assert {total for phase, _, total in told if phase == "examples"} == {N}
    assert all(0 <= done <= total for _, done, total in told)


def test_a_defense_over_several_sites_is_refused() -> None:
    clamps = (defense().clamps[0], Clamp(signed_basis(Site(3)), (0,), Set(0.0)))
    with pytest.raises(InputError, match=r"several sites \(blocks.2.hook_resid_pre, blocks.3.hook_resid_pre\)"):
        run(defense=Defense(clamps))


def test_a_bad_budget_is_refused_even_where_nothing_would_be_searched() -> None:
    for budget in (0.0, -1.0, float("nan")):
        with pytest.raises(InputError, match="budget"):
            run(budget=budget, defense=Defense((Clamp(signed_basis(), FEATURES, Scale(1.0)),)))


def test_examples_need_one_id_each() -> None:
    prompts, behavior = left_padded(ROWS[:2]), LogitDifference(TARGET[:2], OTHER[:2])
    for ids, complaint in ((["a"], "1 ids for 2"), (["a", "a"], "same id")):
        with pytest.raises(InputError, match=complaint):
            Examples(ids, prompts, behavior)
    part = Examples(["a", "b"], prompts, behavior, ["A", "B"]).select(torch.tensor([1]))
    assert (part.ids, part.texts, part.behavior.target.tolist()) == (["b"], ["B"], [1])  # type: ignore[attr-defined]
