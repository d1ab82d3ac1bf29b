"""Laws of the engine, the certificate and the whole check: what runs together, padded, cut or interrupted is as alone.

Models of every supported family, tiny and random. They run in float64 where the engine allows it: a random network can
turn a rounding into much more, and so half of the digits of float64 (`HALF_THE_DIGITS`, 1.5e-8 of the largest logit)
are asked for, where a misplaced position or mask changes the first. Certificates are float32 by design; they are
measured on the shallow `PlainLM`, whose blocks are of slope of order 1, and half of float32's digits are asked for.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import torch
from hypothesis import Phase, assume, find, given, settings
from hypothesis import strategies as st
from torch import Tensor

from property_tests.guards import guards
from property_tests.rounding import assert_within, eps, product_error, projection_leak
from property_tests.strategies import COMPETING, SEEDS, ClampCase, SAECase, clamp_cases, costly, randn
from recover.defenses.clamps import Clamp, Defense, Set
from recover.defenses.defended import defend
from recover.evidence.certificate import Certificate, certify
from recover.models.host import Model, Prompts
from recover.planted import KINDS
from recover.protocol.checking import check
from recover.protocol.folder import DELTAS, EXAMPLES, TEMPORARY, UNITS, RunFolder, RunState
from recover.protocol.runtime import Runtime
from recover.protocol.verdict import Verdict
from recover.saes.sae import SAE
from recover.search.ascent import Schedule
from recover.search.constraints.linear import ActivationStable, EncoderOrthogonal
from recover.tasks.behaviors import LogitDifference, Targeted
from recover.tasks.examples import Examples
from recover.types import Placement, Site, Surface
from tests.models import D_MODEL, FAMILIES, N_LAYERS, VOCAB, left_padded, plain_lm, tiny_lm, token_rows
from tests.saes import POINTWISE
from tests.test_check import LIGHT
from tests.test_check import defense as hard_clamp

HALF_THE_DIGITS = eps(torch.float64) ** 0.5
HALF_OF_FLOAT32 = eps(torch.float32) ** 0.5
RESIDUAL = projection_leak(D_MODEL, torch.float32) + product_error(torch.ones(1, D_MODEL), torch.eye(D_MODEL)).max()
"""What a projection leaves, and what measuring it in float32 adds, as shares."""


@lru_cache(maxsize=32)
def model_of(family: str, seed: int) -> Model:
    """One of transformers' families, or the plain module."""
    return Model((plain_lm(seed) if family == "plain" else tiny_lm(family, seed=seed)).to(dtype_of(family)))


def dtype_of(family: str) -> torch.dtype:
    """Gemma 2 takes its softmax in float32, where a mask of float64's most negative number makes padding NaN."""
    return torch.float32 if family == "gemma2" else torch.float64


@dataclass(frozen=True)
class EngineCase:
    """A model, prompts, a place and a perturbation of its last `n_pos` positions."""

    family: str
    model_seed: int
    lengths: tuple[int, ...]
    n_pos: int
    layer: int
    point: str
    seed: int
    size: float

    @property
    def model(self) -> Model:
        return model_of(self.family, self.model_seed)

    @property
    def site(self) -> Site:
        return Site(self.layer, self.point)  # type: ignore[arg-type]

    @property
    def rows(self) -> list[Tensor]:
        return token_rows(self.lengths, seed=self.seed)

    @property
    def prompts(self) -> Prompts:
        return left_padded(self.rows)

    def delta(self) -> Tensor:
        return self.size * randn(len(self.lengths), self.n_pos, D_MODEL, seed=self.seed, dtype=self.model.dtype)

    def edit(self, delta: Tensor) -> Any:
        """The perturbation as an edit of whole prompts."""

        def add(residual: Tensor, positions: Tensor) -> Tensor:
            return torch.cat([residual[:, : -self.n_pos], residual[:, -self.n_pos :] + delta], dim=1)

        return {self.site: add}


@st.composite
def engines(draw: st.DrawFn, families: tuple[str, ...] = FAMILIES, equal: bool = False) -> EngineCase:
    lengths = draw(st.lists(st.integers(1, 10), min_size=1, max_size=4))
    lengths = [lengths[0]] * len(lengths) if equal else lengths
    return EngineCase(
        family=draw(st.sampled_from(families)),
        model_seed=draw(st.integers(0, 2)),
        lengths=tuple(lengths),
        n_pos=draw(st.integers(1, min(lengths))),
        layer=draw(st.integers(0, 2 if "plain" in families else N_LAYERS - 1)),
        point=draw(st.sampled_from(["pre", "post"])),
        seed=draw(SEEDS),
        size=draw(st.sampled_from([0.0, 0.5, 5.0])),
    )


def same(actual: Tensor, expected: Tensor) -> None:
    """Equal in half of the digits of their dtype."""
    assert expected.isfinite().all()
    assert_within(actual, expected, eps(expected.dtype) ** 0.5 * float(expected.abs().max() + 1))


@guards(
    "recover.models.host.Model._inputs",
    '"position_ids": positions.clamp(min=0)}',
    '"position_ids": torch.arange(positions.shape[1]).expand_as(positions)}',
)
@costly()
@given(engines())
def test_a_batch_of_prompts_gives_what_its_prompts_give_one_by_one(case: EngineCase) -> None:
    """Residuals of real tokens and logits; padding is what differs."""
    with torch.no_grad():
        together = case.model.run(case.prompts, read=[case.site], edits=case.edit(case.delta()))
        for row, ids in enumerate(case.rows):
            one = case.edit(case.delta()[row : row + 1])
            alone = case.model.run(left_padded([ids]), read=[case.site], edits=one)
            same(together.logits[row], alone.logits[0])
            same(together.residuals[case.site][row, -len(ids) :], alone.residuals[case.site][0])


@guards(
    "recover.models.host.Model._inputs",
    '{"input_ids": prompts.ids, "attention_mask": real.long(),',
    '{"input_ids": prompts.ids, "attention_mask": torch.ones_like(real.long()),',
)
@costly()
@given(engines(), st.integers(1, 6))
def test_more_padding_does_not_matter(case: EngineCase, more: int) -> None:
    """Padding may hold any tokens."""
    ids, mask = case.prompts.ids, case.prompts.mask
    noise = torch.randint(0, VOCAB, (len(ids), more), generator=torch.Generator().manual_seed(case.seed))
    wide = Prompts(torch.cat([noise, ids], dim=1), torch.cat([torch.zeros_like(noise).bool(), mask], dim=1))
    with torch.no_grad():
        one, other = (case.model.run(p, edits=case.edit(case.delta())).logits for p in (case.prompts, wide))
    same(other, one)
    assert torch.equal(wide.select(torch.arange(len(ids))).ids, ids)


@guards(
    Prompts.select,
    "ids, mask = self.ids[rows], self.mask[rows]\n        start",
    "ids, mask = self.ids[rows.sort().values], self.mask[rows]\n        start",
)
@costly()
@given(engines(), SEEDS)
def test_the_order_of_prompts_does_not_matter(case: EngineCase, seed: int) -> None:
    order = torch.randperm(len(case.lengths), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        straight = case.model.run(case.prompts, edits=case.edit(case.delta())).logits
        shuffled = case.model.run(case.prompts.select(order), edits=case.edit(case.delta()[order])).logits
    same(shuffled, straight[order])


@guards(
    "recover.models.prefix.StoredLayer.update",
    "torch.cat([self.keys, key_states], dim=-2)",
    "torch.cat([self.keys.roll(1, dims=-2), key_states], dim=-2)",
)
@costly()
@given(engines((*FAMILIES, "plain"), equal=True) | engines())
def test_a_suffix_run_is_the_whole_run(case: EngineCase) -> None:
    """Logits, and their gradient in the perturbation."""
    model, tokens = case.model, torch.randint(0, VOCAB, (len(case.lengths), 3))
    with torch.no_grad():
        residual = model.run(case.prompts, read=[case.site]).residuals[case.site]
    run, suffix = model.prefill(case.prompts, (case.site, residual), n_pos=case.n_pos)
    same(run.logits, model.run(case.prompts).logits)
    leaf = case.delta().requires_grad_(True)
    short = suffix.logits(suffix.residual + leaf, tokens)
    whole = model.run(case.prompts, edits=case.edit(leaf), tokens=tokens).logits
    same(short.detach(), whole.detach())
    upstream = randn(*short.shape, seed=case.seed, dtype=short.dtype)
    gradients = [torch.autograd.grad(logits, leaf, upstream)[0] for logits in (short, whole)]
    same(gradients[0], gradients[1])


@guards(Model.run, "found[index] = h", "found[index] = 1.01 * h")
@costly()
@given(engines())
def test_reading_changes_nothing_and_a_run_may_start_from_what_was_read(case: EngineCase) -> None:
    """To the bit for reading and for an edit that edits nothing; some columns of the head are columns of all logits."""
    model, tokens = case.model, torch.randint(0, VOCAB, (len(case.lengths), 4))
    weights = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    with torch.no_grad():
        plain = model.run(case.prompts).logits
        read = model.run(case.prompts, read=[case.site])
        started = model.run(case.prompts, start=(case.site, read.residuals[case.site])).logits
        edited = model.run(case.prompts, edits={case.site: lambda residual, _: residual}).logits
        some = model.run(case.prompts, tokens=tokens).logits
    assert torch.equal(read.logits, plain)
    assert torch.equal(edited, plain)
    same(started, plain)
    same(some, plain.gather(1, tokens))
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.module.state_dict().items())


@dataclass(frozen=True)
class DefendedCase:
    """A clamped tiny model; the delta is admissible (C1) if `orthogonal`."""

    engine: EngineCase
    sae: SAECase
    clamp: ClampCase
    placement: str
    orthogonal: bool
    skip_first: int

    def defense(self, dtype: torch.dtype) -> Defense:
        sae = self.sae.sae(dtype)
        case = self.clamp
        clamp = Clamp(sae, case.features, case.edit(), case.only_active, case.positions, self.engine.site)  # type: ignore[arg-type]
        return Defense((clamp,), self.skip_first)

    def delta(self, dtype: torch.dtype) -> Tensor:
        delta = self.engine.delta().to(dtype)
        return EncoderOrthogonal.of(*self.defense(dtype).clamps).project(delta) if self.orthogonal else delta

    @property
    def behavior(self) -> LogitDifference:
        pairs = [
            torch.randperm(VOCAB, generator=torch.Generator().manual_seed(self.engine.seed + i))[:2] for i in range(9)
        ]
        chosen = torch.stack(pairs[: len(self.engine.lengths)])
        return LogitDifference(chosen[:, 0], chosen[:, 1])


@st.composite
def defended_cases(draw: st.DrawFn, family: str, architectures: tuple[str, ...]) -> DefendedCase:
    architecture = draw(st.sampled_from(architectures))
    return DefendedCase(
        engine=draw(engines(("plain",), equal=True) if family == "plain" else engines((family,))),
        sae=SAECase(architecture, D_MODEL, 20, draw(SEEDS), draw(st.booleans()), k=6),
        clamp=draw(clamp_cases(20, positions=("all", "last"), among=(1, 4, 9, 13))),
        placement=draw(st.sampled_from(["after_clamp", "before_clamp"])),
        orthogonal=draw(st.booleans()),
        skip_first=draw(st.integers(0, 2)),
    )


@guards(
    "recover.defenses.defended.Defended.perturbed",
    "return self.suffix.residual + delta",
    "return self.base[:, -self.suffix.n_pos :] + delta",
)
@costly()
@given(defended_cases("llama", POINTWISE))
def test_under_c1_with_pointwise_features_a_delta_acts_alike_before_and_after_the_clamp(case: DefendedCase) -> None:
    case = replace(case, orthogonal=True)
    defense, engine = case.defense(torch.float64), case.engine
    with torch.no_grad():
        both = [
            defend(
                engine.model,
                defense,
                engine.prompts,
                case.behavior,
                n_pos=engine.n_pos,
                surface=Surface(placement=placement),
            )
            for placement in ("after_clamp", "before_clamp")  # type: ignore[arg-type]
        ]
        clamp, h = defense.clamps[0], both[0].base
        near = (clamp.pre_activations(h) - clamp.threshold).abs().min()
        assume(near > HALF_THE_DIGITS)
        after, before = (one.logits(case.delta(torch.float64)) for one in both)
    same(after, before)


@guards(defend, "clamp_edits(defense, reads - 1)", "{}")
@guards("recover.defenses.defended.clamp_edits", "positions >= defense.skip_first", "positions >= 0")
@guards(
    "recover.defenses.defended.Defended.perturbed",
    "state = edits[self.suffix.site](whole, self.suffix.prompts.positions)",
    "state = whole",
)
@costly(40)
@given(defended_cases("gpt2", (*POINTWISE, *COMPETING)))
def test_the_defended_state_is_the_clamped_model_and_no_delta_leaves_it(case: DefendedCase) -> None:
    """Both placements; base logits are those of the model alone, and no clamp acts on the tokens that are skipped."""
    defense, engine = case.defense(torch.float64), case.engine
    behavior = case.behavior

    def clamping(residual: Tensor, positions: Tensor) -> Tensor:
        return defense.clamps[0].apply(residual, positions >= case.skip_first)

    with torch.no_grad():
        bare = engine.model.run(engine.prompts).logits.gather(1, behavior.tokens)
        clamped = engine.model.run(engine.prompts, edits={engine.site: clamping}).logits.gather(1, behavior.tokens)
    for placement in get_args(Placement):
        defended = defend(
            engine.model, defense, engine.prompts, behavior, n_pos=engine.n_pos, surface=Surface(placement=placement)
        )
        same(defended.base_logits, bare)
        same(defended.defended_logits, clamped)
        with torch.no_grad():
            same(defended.logits(defended.zero_delta.double()), clamped)
        flips = set(defended.valid_flips.tolist())
        shown = zip(defended.shown_at_base.tolist(), defended.shown_when_defended.tolist(), strict=True)
        assert flips == {row for row, (base, left) in enumerate(shown) if base and not left}


def certificate_of(case: DefendedCase, rows: Tensor) -> Certificate:
    """Certify the examples `rows` with the plain module, in float32."""
    model, engine = Model(plain_lm(case.engine.model_seed)), case.engine
    return certify(
        model,
        case.defense(torch.float32),
        engine.prompts.select(rows),
        case.behavior.select(rows),
        case.delta(torch.float32)[rows],
        Surface(placement=case.placement),  # type: ignore[arg-type]
    )


ANY = settings(max_examples=300, database=None, derandomize=True, phases=[Phase.generate])
"""Settings of a search for a counterexample: the first one is enough."""

CONTINUOUS = ("standard",)
"""Where no threshold jumps, so that rounding cannot tell a figure apart by more than rounding."""


@guards(
    "recover.evidence.certificate._replay",
    "reach[:, -delta[index].shape[1] :] = delta[index]",
    "reach[:, -delta[index].shape[1] :] = delta[index].mean(dim=0)",
)
@costly()
@given(defended_cases("plain", CONTINUOUS), SEEDS)
def test_a_certificate_does_not_depend_on_the_order_of_examples_or_the_rest_of_the_batch(
    case: DefendedCase, seed: int
) -> None:
    """Each figure of an example is the same alone, in another order and in another batch."""
    case = replace(case, clamp=replace(case.clamp, only_active=False))
    n = len(case.engine.lengths)
    together = certificate_of(case, torch.arange(n))
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    shuffled, alone = certificate_of(case, order), certificate_of(case, order[:1])
    for name, values in vars(together).items():
        if values.dtype == torch.bool or name in ("dormant", "reactivated"):
            # Counted at a threshold, on which rounding may decide.
            continue
        for part, rows in ((shuffled, order), (alone, order[:1])):
            found, expected = getattr(part, name), values[rows]
            finite = expected.isfinite()
            assert torch.equal(finite, found.isfinite()), name
            if name in ("relative_drift", "clamp_floor_violation"):
                # Shares of a norm that may be tiny: measured against features of order 1.
                finite = finite & (together.drift[rows] > HALF_OF_FLOAT32) & (expected < 1e3)
            size = float(expected[finite].abs().max() + 1) if finite.any() else 1.0
            assert_within(found[finite], expected[finite], HALF_OF_FLOAT32 * size)
    assert torch.equal(together.shows, together.slack > 0)
    assert (together.reactivated <= together.dormant).all()


@guards("recover.evidence.certificate._clamp_facts", "(pre_rec - pre_def).abs(),", "(pre_rec + pre_def).abs(),")
@costly()
@given(defended_cases("plain", POINTWISE))
def test_a_certificate_of_an_admissible_delta_says_that_nothing_moved(case: DefendedCase) -> None:
    """And of any delta: decode drift is at most `||W_dec||` drift, and a zero delta has none."""
    case = replace(case, orthogonal=True)
    facts = certificate_of(case, torch.arange(len(case.engine.lengths)))
    clamp = case.defense(torch.float32).clamps[0]
    # A read of d_model terms, at h and at h + delta, of residuals no larger than the norms here.
    size = facts.norm + facts.displacement + facts.norm / facts.relative_norm.clamp(min=1e-6) + 1
    reading = 4 * (D_MODEL + 2) * eps(torch.float32) * clamp.encoder.norm(dim=0).max() * size + 1e-4
    assert (facts.constraint_residual <= RESIDUAL).all()
    assert (facts.preactivation_shift.amax(dim=1) <= reading).all()
    steep = float(getattr(clamp.sae.activation, "scale", torch.ones(1)).max())
    settled = (facts.threshold_margin.abs() > reading[:, None]).all(dim=1)
    most = steep * reading * (len(case.clamp.features) * case.engine.n_pos) ** 0.5
    assert (facts.drift[settled] <= most[settled]).all()
    assert (facts.decode_drift <= facts.drift * clamp.decoder.norm() * (1 + 1e-5)).all()
    assert (facts.reactivated[settled] == 0).all()


@guards(certify, "drift=metrics.activation_drift(z_rec, z_def),", "drift=0 * metrics.activation_drift(z_rec, z_def),")
def test_where_features_compete_the_certificate_catches_what_c1_allows() -> None:
    """A counterexample to "C1 implies C2" that hypothesis finds in a model's own residuals, certified."""

    def drifts(case: DefendedCase) -> bool:
        defense, engine = case.defense(torch.float32), case.engine
        model = Model(plain_lm(engine.model_seed))
        defended = defend(model, defense, engine.prompts, case.behavior, n_pos=engine.n_pos)
        clamp, delta = defense.clamps[0], case.delta(torch.float32)
        return bool((ActivationStable(clamp, defended.suffix.residual).violation(delta) > 0.5).any())

    draws = defended_cases("plain", COMPETING).map(
        lambda case: replace(case, orthogonal=True, placement="after_clamp", skip_first=0)
    )
    case = find(draws, drifts, settings=ANY)
    facts = certificate_of(case, torch.arange(len(case.engine.lengths)))
    assert facts.constraint_residual.max() <= RESIDUAL
    assert facts.drift.max() > 0.4
    assert facts.threshold_margin.isnan().all()


class Interruption(Exception):  # noqa: N818 (it is no error)
    pass


class Dying(RunFolder):
    """The folder of a run whose process dies at its `left`-th write, before it or after it."""

    def __init__(self, path: Path, left: int, after: bool) -> None:
        super().__init__(path)
        self.left, self.after, self.kept = left, after, Counter[str]()

    def write(self, name: str, content: bytes) -> None:
        self.left -= 1
        if self.left < 0 and not self.after:
            raise Interruption
        super().write(name, content)
        if self.left < 0:
            raise Interruption

    def keep(self, unit: str, values: Any, deltas: Mapping[str, Tensor]) -> None:
        self.kept[unit] += 1
        super().keep(unit, values, deltas)


STATE = RunState(config={}, keep_text=False, fingerprint="", batch_size=1, features=[], values=[])


@dataclass(frozen=True)
class FolderCase:
    """A whole check of a planted world in a folder; its process dies at the `dies`-th write, and again at `again`.

    `wrong` examples are asked for an answer that is not theirs, so that they do not flip.
    """

    kind: str
    n: int
    batch_size: int
    seed: int
    wrong: int
    share: float
    dies: int
    again: int
    after: bool

    def start(self, path: Path, left: int = 10**6) -> tuple[dict[str, Any], Counter[str]]:
        """One start of the run: what it says but for its times, and the units that it worked on."""
        world = KINDS[self.kind](self.seed, n_prompts=self.n)
        right = world.examples.behavior
        assert isinstance(right, Targeted)
        asked = right.target.where(torch.arange(self.n) >= self.wrong, right.rivals[:, 0])
        folder = Dying(path, left, self.after)
        try:
            if folder.state is None:
                folder.begin(STATE)
            else:
                folder.resume()
            verdict = check(
                world.model,
                world.defense,
                replace(world.examples, behavior=right.retarget(asked)),
                self.share * world.budget,
                plan=replace(LIGHT, schedule=Schedule(steps=10, restarts=0, seed=self.seed)),
                runtime=Runtime(batch_size=self.batch_size, store=folder),
            )
            folder.finish(verdict.records)
        finally:
            folder.close()
        return {k: v for k, v in verdict.to_dict().items() if k != "provenance"}, folder.kept

    def units(self, path: Path) -> dict[str, Any]:
        """What the units on disk hold but for their times, by file."""
        found = {file.name: json.loads(file.read_text()) for file in (path / UNITS).glob("*.json")}
        for unit in found.values():
            del unit["values"]["seconds"]
        return found


@guards(RunFolder.resume, ', *sorted((self.path / UNITS).glob("*.safetensors"))', "")
@guards("recover.protocol.ledger.Ledger.run", "if self.store.load(unit) is not None:", "if False:")
@costly(5)
@given(
    st.builds(
        FolderCase,
        kind=st.sampled_from(["write_only", "complete_bottleneck", "two_layers"]),
        n=st.integers(2, 8),
        batch_size=st.integers(2, 4),
        seed=SEEDS,
        wrong=st.integers(0, 4),
        share=st.sampled_from([0.1, 1.0]),
        dies=st.integers(0, 30),
        again=st.integers(0, 15),
        after=st.booleans(),
    )
)
def test_a_resumed_check_is_an_uninterrupted_one(case: FolderCase) -> None:
    """Verdict, records, units and deltas to the byte, on disk, wherever it dies, twice; no finished unit is run again.

    (By SIGKILL: tests/test_cli.py.)
    """
    with TemporaryDirectory() as folder:
        whole, cut = Path(folder) / "whole", Path(folder) / "cut"
        expected, every = case.start(whole)
        worked: Counter[str] = Counter()
        for left in (case.dies, case.again, 10**6):
            before = set(case.units(cut)) if (cut / UNITS).exists() else set()
            with suppress(Interruption):
                found, kept = case.start(cut, left)
                assert not {f"{unit.replace('/', '-')}.json" for unit in kept} & before
                worked += kept
        assert found == expected
        assert set(worked) <= set(every)
        assert set(every.values()) == {1}
        assert case.units(cut) == case.units(whole)
        for name in (DELTAS, EXAMPLES):
            assert (cut / name).exists() == (whole / name).exists()
            assert not (cut / name).exists() or (cut / name).read_bytes() == (whole / name).read_bytes()
        assert not list(cut.rglob(f"{TEMPORARY}*"))


@dataclass(frozen=True)
class CheckCase:
    """A whole check of a defense that can be undone, on prompts of unequal length."""

    n: int
    batch_size: int
    seed: int
    value: float
    budget: float

    def run(self, batch_size: int | None = None) -> Verdict:
        rows = token_rows([3 + i % 4 for i in range(self.n)], seed=self.seed)
        behavior = LogitDifference(torch.arange(self.n), torch.arange(self.n) + 30)
        return check(
            Model(tiny_lm()),
            hard_clamp(self.value),
            Examples([f"e{i}" for i in range(self.n)], left_padded(rows), behavior),
            self.budget,
            plan=replace(LIGHT, schedule=Schedule(steps=4, restarts=1, seed=self.seed)),
            runtime=Runtime(batch_size=batch_size or self.batch_size),
        )


@guards(
    "recover.tasks.examples.Examples.select",
    "            self.behavior.select(rows),\n",
    "            self.behavior.select(torch.arange(len(rows))),\n",
)
@costly(3)
@given(
    st.builds(
        CheckCase,
        n=st.integers(2, 6),
        batch_size=st.integers(2, 5),
        seed=SEEDS,
        value=st.sampled_from([5.0, 20.0]),
        budget=st.sampled_from([1.0, 15.0]),
    ),
    st.integers(1, 6),
)
def test_a_check_in_batches_of_another_size_counts_the_same(case: CheckCase, batch_size: int) -> None:
    """Wherever no slack is within the rounding of float32 (half of its digits) of where counts change."""
    one, other = case.run(), case.run(batch_size)
    tolerance = 40 * HALF_OF_FLOAT32
    for record, again in zip(one.records, other.records, strict=True):
        assert record.id == again.id
        assert abs(record.base_slack - again.base_slack) <= tolerance
        assert abs(record.defended_slack - again.defended_slack) <= tolerance
        assume(min(abs(record.base_slack), abs(record.defended_slack)) > tolerance)
    first, second = one.to_dict(), other.to_dict()
    assert first["counts"] == second["counts"]
    assert first["recovery"]["searched"] == second["recovery"]["searched"]
    assert first["counts"]["valid_flips"] == first["recovery"]["searched"] or first["verdict"] == "INVALID"


@guards(
    "recover.defenses.defended.clamp_edits",
    "return defense.apply(site, residual, positions >= defense.skip_first, n_answer)",
    "return residual",
)
def test_the_clamp_of_these_checks_can_be_undone() -> None:
    """Or the two laws above would hold of nothing."""
    found = CheckCase(10, 10, 0, 20.0, 15.0).run()
    assert found.counts.valid_flips > 0
    assert isinstance(hard_clamp().clamps[0].sae, SAE)
    assert isinstance(hard_clamp().clamps[0].mode, Set)
    with TemporaryDirectory() as folder:
        said, kept = FolderCase("write_only", 6, 4, 0, 2, 1.0, 0, 0, False).start(Path(folder))
    assert said["counts"]["valid_flips"] == said["recovery"]["recovered"] == 4
    assert len(kept) > 15
