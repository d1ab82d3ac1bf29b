"""Laws of the planted worlds: what each construction promises, and that the checker finds it, for any seed and sizes.

The worlds are float32 networks of coordinates of order 1; where an answer is a closed form, the tolerance is the share
by which a behavior's margin and a bisection miss an edge (1 %, as `recover selftest` allows), and where nothing may
change, half of the digits of float32.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from property_tests.guards import guards
from property_tests.rounding import assert_within, eps
from property_tests.strategies import SEEDS, costly, randn
from recover.defenses.defended import Defended, defend
from recover.evidence.certificate import certify
from recover.numerics.metrics import norm
from recover.planted import KINDS, MIXTURES, Planted
from recover.planted.meaning import likeliest
from recover.planted.selftest import PLAN, TOLERANCE, UNMEASURED, judge, norm_error
from recover.protocol.checking import check
from recover.saes.decomposition import decompose
from recover.search.ascent import find_perturbation, scale_to
from recover.search.constraints.first_order import JacobianOrthogonal, admissible
from recover.search.constraints.linear import EncoderOrthogonal
from recover.search.minimum import smallest_perturbation

HALF_THE_DIGITS = eps(torch.float32) ** 0.5
ONE_SITE = tuple(kind for kind in KINDS if kind != "two_layers")
ALL = (*KINDS, *MIXTURES)
EXACT = ("error_bypass", "feature_bypass", "two_layers", "degenerate_geometry")
"""Kinds whose smallest norm is a closed form that a gradient leads to."""


@dataclass(frozen=True)
class PlantedCase:
    """A kind, a seed, and the sizes that all kinds share; `room` dimensions more than the kind needs."""

    kind: str
    seed: int
    n_answers: int
    n_context: int
    n_prompts: int
    room: int
    length: int
    depth: int

    @property
    def options(self) -> dict[str, Any]:
        """What only some kinds have: groups that the answers fill, a share that leaves a prompt of either sort."""
        pairs = {"members": 2 if self.n_answers % 2 == 0 else self.n_answers}
        return {"half_erased": pairs, "some_routes": {"share": 0.5} if self.n_prompts < 5 else {}}.get(self.kind, {})

    @property
    def world(self) -> Planted:
        return _world(self)

    @property
    def defended(self) -> Defended:
        world = self.world
        return defend(world.model, world.defense, world.examples.prompts, world.examples.behavior)

    @property
    def feasible(self) -> EncoderOrthogonal | JacobianOrthogonal:
        """What a check keeps to."""
        return admissible(self.defended)

    def push(self, size: float) -> Tensor:
        """A random admissible delta of this norm for each example."""
        noise = randn(self.n_prompts, 1, self.world.model.d_model, seed=self.seed + 1)
        return scale_to(self.world.admissible.project(noise), size)


@lru_cache(maxsize=64)
def _world(case: PlantedCase) -> Planted:
    gated = case.kind in ("shared_route", "undone_clamp", *MIXTURES)
    most = 3 * case.n_answers + case.n_context + (8 if gated else 0)
    return (KINDS | MIXTURES)[case.kind](
        case.seed,
        d_model=most + 1 + case.room,
        n_answers=case.n_answers,
        n_context=case.n_context,
        n_prompts=case.n_prompts,
        length=case.length,
        depth=case.depth,
        **case.options,
    )


def planted(
    kinds: tuple[str, ...] = tuple(KINDS), n_answers: tuple[int, int] = (2, 4), n_prompts: tuple[int, int] = (2, 4)
) -> st.SearchStrategy[PlantedCase]:
    return st.builds(
        PlantedCase,
        kind=st.sampled_from(kinds),
        seed=SEEDS,
        n_answers=st.integers(*n_answers),
        n_context=st.integers(1, 5),
        n_prompts=st.integers(*n_prompts),
        room=st.integers(0, 6),
        length=st.integers(2, 4),
        depth=st.integers(1, 2),
    )


@guards(
    "recover.planted.world.Draw.__init__",
    "self.generator = torch.Generator().manual_seed(seed)",
    "self.generator = torch.Generator().manual_seed(torch.seed() % 1000)",
)
@guards("recover.planted.world.Atoms.of", "return cls(T, torch.linalg.pinv(T))", "return cls(T, T.T)")
@costly(40)
@given(planted(ALL))
def test_every_planted_example_is_a_valid_flip_and_a_seed_is_a_world(case: PlantedCase) -> None:
    assert case.defended.valid_flips.tolist() == list(range(case.n_prompts))
    one, other = case.world, _world.__wrapped__(case)
    assert one.budget == other.budget
    weights = other.model.module.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in one.model.module.state_dict().items())


@guards("recover.planted.world.planted_sae", "return sae, order.argsort()", "return sae, order")
@guards(
    "recover.planted.world.planted_sae",
    "W_enc=columns[:, order].float().contiguous(),",
    "W_enc=rows[order].T.float().contiguous(),",
)
@costly(40)
@given(planted((*ONE_SITE, *MIXTURES)))
def test_the_planted_admissible_space_is_the_one_of_the_clamped_encoders(case: PlantedCase) -> None:
    """The construction's directions in float64 against the SAE's float32 columns: half of the digits of float32.

    Columns that depend on others do so up to the rounding of float32, which the rank must not count.
    """
    found = EncoderOrthogonal.of(*case.world.defense.clamps).null_space
    eye = torch.eye(case.world.model.d_model, dtype=torch.float64)
    assert found.rank == case.world.admissible.rank
    assert_within(found.project(eye), case.world.admissible.project(eye), 100 * HALF_THE_DIGITS)


@guards(admissible, "return JacobianOrthogonal.of(first, jacobian(defended), torch.cat(read))", "return first")
@costly(20)
@given(planted(("two_layers",)) | planted(ALL))
def test_what_a_check_keeps_to_is_the_planted_admissible_space(case: PlantedCase) -> None:
    """Over two sites too, where a check has it from a Jacobian and the construction from its matrices."""
    anywhere = randn(case.n_prompts, 1, case.world.model.d_model, seed=case.seed)
    assert_within(case.feasible.project(anywhere), case.world.admissible.project(anywhere), 100 * HALF_THE_DIGITS)


@guards("recover.planted.layers.two_layers", "J.T @ second.W[:, b.start : b.stop]", "second.W[:, b.start : b.stop]")
@costly(20)
@given(planted(("two_layers",)) | planted(ALL), st.sampled_from([0.1, 1.0, 30.0]))
def test_an_admissible_delta_moves_no_clamped_feature_at_any_site(case: PlantedCase, size: float) -> None:
    """By the certificate's own replay; over two sites too, where the second sees what a delta at the first does."""
    world = case.world
    facts = certify(world.model, world.defense, world.examples.prompts, world.examples.behavior, case.push(size))
    assert (facts.preactivation_shift <= 10 * HALF_THE_DIGITS * (1 + size)).all()
    assert (facts.reactivated == 0).all()


@guards(
    "recover.planted.routes.complete_bottleneck",
    "U, f = atoms.W[:, :n_answers], Tangled",
    "U, f = atoms.W[:, :n_answers] + 0.01, Tangled",
)
@costly(20)
@given(planted(("complete_bottleneck",)), st.sampled_from([0.1, 1.0, 100.0]))
def test_no_admissible_delta_changes_what_a_complete_bottleneck_says(case: PlantedCase, size: float) -> None:
    """Whatever its size: every logit that the behavior reads."""
    defended = case.defended
    with torch.no_grad():
        moved = defended.logits(case.push(size))
    assert_within(moved, defended.defended_logits, 10 * HALF_THE_DIGITS * (1 + size))


@guards(
    "recover.planted.world.distance",
    "norms: Tensor = -slack / within.sqrt()",
    "norms: Tensor = -2 * slack / within.sqrt()",
)
@costly(40)
@given(planted(ALL), st.floats(0.05, 0.999))
def test_nothing_shorter_than_the_smallest_norm_recovers(case: PlantedCase, share: float) -> None:
    """Random admissible deltas, and the most telling direction there is, the gradient's."""
    world, defended = case.world, case.defended
    assert world.smallest_norm is not None
    reach = world.smallest_norm.clamp(max=50.0)
    leaf = defended.zero_delta.requires_grad_(True)
    (gradient,) = torch.autograd.grad(defended(leaf)[1].sum(), leaf)
    for direction in (case.push(1.0), -case.push(1.0), world.admissible.project(gradient)):
        with torch.no_grad():
            _, slack = defended(scale_to(direction, share * reach))
        assert (slack <= 10 * HALF_THE_DIGITS * (1 + reach)).all()


@guards(
    "recover.planted.world.distance",
    "norms: Tensor = -slack / within.sqrt()",
    "norms: Tensor = -1.1 * slack / within.sqrt()",
)
@costly(15)
@given(planted(EXACT))
def test_a_budget_just_below_the_smallest_norm_recovers_nothing_and_one_just_above_everything(
    case: PlantedCase,
) -> None:
    """By 3 %: the search stops at a slack of 0.02 logits above the edge, and slopes are 0.2 at least."""
    world, defended = case.world, case.defended
    assert world.smallest_norm is not None
    short, long = float(world.smallest_norm.min()), float(world.smallest_norm.max())
    below = find_perturbation(defended, defended.zero_delta, case.feasible, min(0.97 * short, 50.0))
    assert not below.recovered.any()
    if world.smallest_norm.isfinite().all():
        with torch.no_grad():
            slope = (defended(defended.zero_delta)[1] / world.smallest_norm).abs().min()
        above = find_perturbation(defended, defended.zero_delta, case.feasible, 1.03 * long + 0.1 / float(slope))
        assert above.recovered.all()
        assert (norm(above.delta) >= 0.99 * world.smallest_norm).all()


@guards(
    "recover.planted.world.distance",
    "norms: Tensor = -slack / within.sqrt()",
    "norms: Tensor = -0.97 * slack / within.sqrt()",
)
@costly(15)
@given(planted((*EXACT, "shared_route", "undone_clamp", *MIXTURES)))
def test_the_smallest_norm_that_is_measured_is_the_closed_form(case: PlantedCase) -> None:
    world, defended = case.world, case.defended
    assert world.smallest_norm is not None
    found = smallest_perturbation(defended, defended.zero_delta, case.feasible)
    finite = world.smallest_norm.isfinite()
    assert torch.equal(found.norm.isfinite(), finite)
    assert_within(found.norm[finite], world.smallest_norm[finite], 0.01 * world.smallest_norm[finite].double())


@guards(
    "recover.planted.routes._bypass",
    'bypass="features" if known else "error"',
    'bypass="error" if known else "features"',
)
@costly(15)
@given(planted(("error_bypass", "feature_bypass")))
def test_what_recovers_lies_where_it_was_planted(case: PlantedCase) -> None:
    """Of the smallest delta, only the part in the error, or only the part in features, is seen by the readout."""
    world, defended = case.world, case.defended
    delta = smallest_perturbation(defended, defended.zero_delta, case.feasible).delta
    sae = world.defense.clamps[0].sae
    h = defended.suffix.residual
    before, after = decompose(sae, h), decompose(sae, h + delta)
    parts = {"features": after.reconstruction - before.reconstruction, "error": after.error - before.error}
    with torch.no_grad():
        slacks = {name: defended(part)[1] for name, part in parts.items()}
        whole, none = defended(delta)[1], defended(defended.zero_delta)[1]
    assert world.bypass is not None
    (elsewhere,) = set(parts) - {world.bypass}
    tolerance = 10 * HALF_THE_DIGITS * (1 + norm(delta))
    assert_within(slacks[world.bypass], whole, tolerance)
    assert_within(slacks[elsewhere], none, tolerance)


@guards(
    "recover.planted.meaning.shared_route",
    "shared=(1.1 * smallest.max() * T[route])",
    "shared=(1.1 * smallest.max() * T[route].roll(1))",
)
@costly(25)
@given(planted(("shared_route", "undone_clamp", *MIXTURES)))
def test_one_shared_delta_reopens_a_route(case: PlantedCase) -> None:
    """Admissible, within the budget, and right for every prompt, or for just those that the construction names."""
    world, defended = case.world, case.defended
    assume(world.shared is not None)
    assert world.shared is not None
    assert (norm(world.shared[None]) <= world.budget).all()
    assert_within(world.admissible.project(world.shared), world.shared, 10 * HALF_THE_DIGITS)
    with torch.no_grad():
        _, slack = defended(world.shared.expand(case.n_prompts, 1, -1))
    every = torch.ones(case.n_prompts, dtype=torch.bool)
    assert torch.equal(slack > 0, every if world.shared_rows is None else world.shared_rows)


@guards(
    "recover.planted.meaning.write_only",
    "clamp = Clamp(sae, where[:n_answers].tolist(), Set(-v), only_active=False)",
    "clamp = Clamp(sae, where[:n_answers].tolist(), Set(-v), only_active=True)",
)
@costly(15)
@given(planted(("write_only",)))
def test_where_only_writing_is_left_a_shared_delta_gives_all_prompts_one_answer(case: PlantedCase) -> None:
    """Nothing of it is left after the clamp, and any answer costs the same, the right one and every other."""
    world, defended = case.world, case.defended
    assert world.smallest_norm is not None
    spread = 10 * HALF_THE_DIGITS * float(1 + defended.defended_logits.abs().max())
    # Of the tokens in one order: the behavior names each prompt's own answer first.
    logits = defended.defended_logits.gather(1, world.examples.behavior.tokens.argsort(dim=1))  # type: ignore[union-attr]
    assert_within(logits, logits[:1].expand_as(logits), spread)
    found = smallest_perturbation(defended, defended.zero_delta, case.feasible)
    longer = scale_to(found.delta, 1.02 * found.norm)
    target = world.examples.behavior.target  # type: ignore[attr-defined]
    for row in range(case.n_prompts):
        with torch.no_grad():
            _, slack = defended(longer[row : row + 1].expand(case.n_prompts, 1, -1))
        assert (slack > 0).tolist() == (target == target[row]).tolist()
    for answer in range(case.n_answers):
        asked = replace(defended, behavior=likeliest(torch.full_like(target, answer), case.n_answers + 1))
        dear = smallest_perturbation(asked, asked.zero_delta, case.feasible).norm
        assert_within(dear, world.smallest_norm, 0.01 * world.smallest_norm.double())


@guards(
    "recover.planted.meaning.undone_clamp",
    "decoders = torch.cat([T[:k] + KAPPA * phi, T[k:unseen]])",
    "decoders = torch.cat([T[:k] + KAPPA * phi.flip(1), T[k:unseen]])",
)
@costly(15)
@given(planted(("undone_clamp",)), st.sampled_from([1.0, 10.0]))
def test_an_undone_clamp_cannot_be_undone_orthogonally_to_what_it_writes(case: PlantedCase, times: float) -> None:
    """Under C1+ no search at any multiple of the budget recovers."""
    world, defended = case.world, case.defended
    strict = admissible(defended, write_orthogonal=True)
    assert not find_perturbation(defended, defended.zero_delta, strict, times * world.budget).recovered.any()
    assert find_perturbation(defended, defended.zero_delta, case.feasible, world.budget).recovered.any()


@guards("recover.search.ascent.Steepest._uphill", "scale_to(self.slope,", "scale_to(-self.slope,")
@costly(8)
@given(planted(ALL, n_answers=(6, 6), n_prompts=(24, 32)))
def test_the_checker_misses_no_planted_world(case: PlantedCase) -> None:
    """`check()` from end to end: the verdict that the construction implies, whether it is specific, the smallest norm.

    As many prompts and answers as `recover selftest` has; of fewer the rules of evidence may rightly say "unknown".
    """
    outcome = judge(case.world, case.seed)
    assert not outcome.miss, replace(outcome, why=outcome.why[:1])


@guards(
    "recover.protocol.verdict.nearest",
    "for c in (record.smallest, record.certificate) if",
    "for c in (record.certificate,) if",
)
@costly(8)
@given(planted(ALL, n_answers=(2, 8), n_prompts=(2, 20)))
def test_the_checker_says_nothing_false_about_a_planted_world(case: PlantedCase) -> None:
    """Worlds of any size: the verdict and the norm are right, and `content` is right or unknown."""
    world = case.world
    said = check(world.model, world.defense, world.examples, world.budget, plan=PLAN)
    assert said.verdict in world.expected
    assert said.content is None or said.content in world.allowed
    if case.kind not in UNMEASURED:
        error = norm_error(world, said)
        assert error is not None
        assert error <= TOLERANCE
