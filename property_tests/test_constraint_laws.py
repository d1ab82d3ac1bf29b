"""Laws of constraints: projections are feasible and never longer, and C1 implies C2 implies C3 if pointwise."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from hypothesis import Phase, assume, find, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from property_tests.guards import guards
from property_tests.rounding import (
    activation_error,
    assert_within,
    eps,
    jump,
    projection_leak,
    reading_error,
    slope,
)
from property_tests.strategies import (
    EPS64,
    SEEDS,
    ClampCase,
    ResidualCase,
    SAECase,
    Scene,
    costly,
    randn,
    residual_cases,
    scenes,
)
from recover.defenses.clamps import Clamp, Defense
from recover.defenses.defended import Defended, defend
from recover.evidence.certificate import certify
from recover.models.host import Model, Prompts
from recover.numerics.metrics import norm
from recover.numerics.subspaces import NullSpace, row_space
from recover.planted.network import Gather, Linear, Network
from recover.search.ascent import scale_to
from recover.search.constraints.first_order import JacobianOrthogonal, admissible
from recover.search.constraints.linear import (
    ActivationStable,
    Budget,
    Constraint,
    Constraints,
    DecodeStable,
    EncoderOrthogonal,
)
from recover.tasks.behaviors import LogitDifference
from recover.types import Site
from tests.saes import POINTWISE

ANY = settings(max_examples=500, database=None, derandomize=True, phases=[Phase.generate])
BUDGETS = st.floats(2**-10, 2**13, width=32)
pointwise_scenes = scenes(architectures=POINTWISE)


def move_error(clamp: Clamp, h: Tensor, delta: Tensor) -> Tensor:
    """Bound on how far rounding alone moves each clamped pre-activation between `h` and `h + delta`.

    Both are read with an error, and their sum is rounded, by eps of its size, before it is read.
    """
    sizes = h.abs() + delta.abs()
    added = eps(h.dtype) * sizes.double() @ clamp.encoder.double().abs()
    return 2 * reading_error(clamp.sae, sizes, clamp.indices) + added


def drift_error(clamp: Clamp, h: Tensor, delta: Tensor) -> Tensor:
    """Bound on how far rounding moves the activations of features that stay on their side of the threshold."""
    pre = h.double().abs() @ clamp.encoder.double().abs() + delta.double().abs() @ clamp.encoder.double().abs()
    pre = pre + clamp.sae.b_enc[clamp.indices].double().abs()
    evaluated = 2 * activation_error(clamp.sae, pre, clamp.indices)
    return slope(clamp.sae.activation, clamp.indices) * move_error(clamp, h, delta) + evaluated


def read_by(clamp: Clamp, delta: Tensor) -> Tensor:
    """`|A^T delta|` in float64, `[batch pos k]`."""
    return (delta.double() @ clamp.encoder.double()).abs()


def per_example(values: Tensor) -> Tensor:
    return values.double().flatten(1).norm(dim=1)


def short(projected: Tensor, delta: Tensor, dims: int) -> Tensor:
    """Whether it is no longer than `delta`, up to the rounding of its entries and of a float64 projection."""
    return norm(projected).double() <= norm(delta).double() * (1 + 2 * eps(delta.dtype) + 16 * dims**2 * EPS64)


def constraints_of(clamp: Clamp, h: Tensor) -> dict[str, Constraint]:
    return {
        "C1": EncoderOrthogonal.of(clamp),
        "C2": ActivationStable(clamp, h),
        "C3": DecodeStable(clamp, h),
    }


def zero_crossing_margin(clamp: Clamp, h: Tensor, reach: Tensor) -> Tensor:
    """Bool: rounding and a move of `reach` leave the feature on its side of the threshold."""
    pre = clamp.pre_activations(h).double()
    threshold = clamp.threshold.double()
    own = reading_error(clamp.sae, h, clamp.indices) + 2 * eps(h.dtype) * threshold
    return (pre - threshold).abs() > own + reach


@guards(
    "recover.numerics.metrics.activation_drift",
    "return norm(z_rec - z_def)\n",
    "return norm(z_rec - z_def) * 1.5 + norm(z_rec)\n",
)
@given(pointwise_scenes)
def test_drift_is_bounded_by_slope_and_jump_of_the_activation(scene: Scene) -> None:
    """For any delta: `|change of z| <= slope |a . delta|`, plus the jump at the threshold where a feature crosses it.

    A ReLU has slope 1 and no jump, so there `drift <= ||A^T delta||`; a JumpReLU jumps to its threshold, a gate has the
    slope of its magnitude path and jumps where that has an offset.
    """
    clamp, h, delta = scene.clamp, scene.residual(), scene.delta()
    activation = clamp.sae.activation
    before, after = clamp.reference(h), clamp.read(h + delta)
    moved = slope(activation, clamp.indices) * read_by(clamp, delta)
    crossed = (before != 0) != (after != 0)
    bound = moved + jump(activation, clamp.indices) * crossed + drift_error(clamp, h, delta)
    assert_within(after, before, bound)
    if scene.sae.architecture == "standard":
        drift = ActivationStable(clamp, h).violation(delta).double()
        error = per_example(drift_error(clamp, h, delta)) + eps(h.dtype) * drift
        assert (drift <= per_example(read_by(clamp, delta)) + error).all()


@guards(
    "recover.saes.activations.JumpReLU.__call__",
    "return torch.relu(pre) * (pre > self.thresholds)",
    "return torch.relu(pre - self.thresholds.clamp(min=0))",
)
def test_a_jumprelu_is_not_1_lipschitz() -> None:
    """Why the law above speaks of jumps: a feature at its threshold wakes to it, however small the push."""
    draws = scenes(("jumprelu",), ("float64",), ("generic",), ("normal",), positions=("all",))

    def steeper(scene: Scene) -> bool:
        clamp, h, delta = scene.clamp, scene.residual(), 0.1 * scene.delta()
        drift = ActivationStable(clamp, h).violation(delta)
        return bool((drift > 1.5 * per_example(read_by(clamp, delta)) + 0.01).any())

    assert find(draws, steeper, settings=ANY)


@guards(NullSpace.project, "free = v.double()\n", "free = v.half().double()\n        return v\n")
@given(pointwise_scenes)
def test_under_c1_drift_is_zero_up_to_rounding(scene: Scene) -> None:
    """C1 implies C2: no pre-activation moves by more than rounding, so no feature away from its threshold does."""
    clamp, h = scene.clamp, scene.residual()
    delta = EncoderOrthogonal.of(clamp).project(scene.delta())
    leak = read_by(clamp, delta)
    # The projection leaves a rounding of delta's own entries.
    tightly = projection_leak(scene.sae.d_model, delta.dtype) * delta.double().norm(dim=-1, keepdim=True)
    assert_within(leak, torch.zeros_like(leak), tightly * clamp.encoder.double().norm(dim=0))
    shift = clamp.pre_activations(h + delta) - clamp.pre_activations(h)
    reach = leak + move_error(clamp, h, delta)
    assert_within(shift, torch.zeros_like(shift), reach + eps(h.dtype) * shift.double().abs())
    clear = zero_crossing_margin(clamp, h, reach)
    drift = clamp.read(h + delta) - clamp.reference(h)
    bound = slope(clamp.sae.activation, clamp.indices) * leak + drift_error(clamp, h, delta)
    assert_within(drift[clear], torch.zeros_like(drift)[clear], bound[clear])
    if clear.all():
        assert (ActivationStable(clamp, h).violation(delta).double() <= 2 * per_example(bound)).all()


@guards(
    "recover.numerics.metrics.decode_drift",
    "return norm(einsum(z_rec - z_def, decoder,",
    "return norm(einsum(z_rec, decoder,",
)
@given(scenes())
def test_what_keeps_the_activations_keeps_what_they_write(scene: Scene) -> None:
    """C2 implies C3: decode drift is at most `||W_dec[S]||` times drift, and zero with it. For every architecture."""
    clamp, h, delta = scene.clamp, scene.residual(), scene.delta()
    drift = ActivationStable(clamp, h).violation(delta).double()
    decoded = DecodeStable(clamp, h).violation(delta).double()
    largest = torch.linalg.matrix_norm(clamp.decoder.double(), ord=2)
    summed = (len(clamp.features) + 2) * eps(h.dtype) * clamp.decoder.double().norm()
    assert (decoded <= (largest + summed) * drift * (1 + 2 * eps(h.dtype))).all()
    assert (decoded[drift == 0] == 0).all()


def of_the_steepest(scene: Scene) -> Scene:
    """The scene with one feature clamped, so that a delta is left room: the one that jumps farthest where it wakes."""
    sae, case = scene.sae.sae(), scene.clamps[0]
    farthest = int(jump(sae.activation, torch.arange(sae.d_sae)).argmax())
    return replace(scene, clamps=(replace(case, features=(farthest,)),))


def at_threshold(clamp: Clamp, h: Tensor) -> Tensor:
    """`h`, moved so that the first clamped feature stands at its threshold: rounding decides on which side."""
    a = clamp.encoder[:, 0].double()
    gap = (clamp.threshold - clamp.pre_activations(h))[..., :1].double()
    return (h.double() + gap * a / a.square().sum().clamp(min=1e-12)).to(h.dtype)


jumping = scenes(("jumprelu", "gated"), geometries=("generic",), kinds=("normal", "huge", "tiny"))
anywhere = st.tuples(pointwise_scenes, st.sampled_from(["C1", "C2", "C3"]), st.just(False))
on_an_edge = st.tuples(jumping.map(of_the_steepest), st.sampled_from(["C2", "C3"]), st.just(True))


@guards(
    ActivationStable.project,
    "crossed = (self.clamp.read(self.h_def + projected) != 0) != active\n",
    "crossed = active & False\n",
)
@guards(
    ActivationStable.project,
    "return torch.where(crossed.any(dim=-1, keepdim=True), 0.0, projected)",
    "return projected",
)
@given(anywhere | on_an_edge)
def test_projections_are_feasible_and_never_longer(drawn: tuple[Scene, str, bool]) -> None:
    """C2 and C3 too, and without a proviso: a feature that rounding alone would wake keeps its reference."""
    scene, name, edge = drawn
    clamp, h, delta = scene.clamp, scene.residual(), scene.delta()
    h = at_threshold(clamp, h) if edge else h
    constraint = constraints_of(clamp, h)[name]
    projected = constraint.project(delta)
    assert short(projected, delta, max(scene.sae.d_model, scene.sae.d_sae)).all()
    tightly = projection_leak(scene.sae.d_model, delta.dtype) * projected.double().norm(dim=-1, keepdim=True)
    leak = tightly * clamp.encoder.double().norm(dim=0)
    bound = {
        "C1": per_example(leak),
        "C2": per_example(slope(clamp.sae.activation, clamp.indices) * leak + drift_error(clamp, h, projected)),
    }
    bound["C3"] = bound["C2"] * clamp.decoder.double().norm() * (1 + scene.sae.d_sae * eps(h.dtype))
    violated = constraint.violation(projected).double()
    assert (violated <= bound[name] * (1 + 8 * eps(h.dtype))).all(), (violated, bound[name])


@guards(
    ActivationStable.project,
    "        active = self.reference != 0\n        held = active\n",
    "        active = self.reference != 0\n        held = active\n        return delta * 0\n",
)
@guards(ActivationStable.project, "woken = crossed & ~held\n", "woken = crossed & held\n")
@given(pointwise_scenes)
def test_c2_leaves_at_least_the_room_of_c1(scene: Scene) -> None:
    """It holds fewer features, so what is left of a delta is no shorter, and what C1 admits it leaves as it is."""
    clamp, h, delta = scene.clamp, scene.residual(), scene.delta()
    narrow = EncoderOrthogonal.of(clamp).project(delta)
    leak = read_by(clamp, delta) + move_error(clamp, h, delta)
    assume(zero_crossing_margin(clamp, h, 0 * leak + move_error(clamp, h, delta)).all())
    wide = ActivationStable(clamp, h).project(delta)
    # Columns that depend on each other but for the rounding of their storage span a direction that is only as sure as
    # their smallest singular value is large.
    singular = torch.linalg.svdvals(torch.nn.functional.normalize(clamp.encoder.double(), dim=0))
    rank = NullSpace.of(clamp.encoder).rank
    sure = float(singular[rank - 1] / singular[0]) if rank else 1.0
    tolerance = 4 * projection_leak(scene.sae.d_model, delta.dtype) / sure
    lengths = [tensor.double().norm(dim=-1) for tensor in (narrow, wide, delta)]
    assert (lengths[0] <= lengths[1] + tolerance * lengths[2]).all()
    again = ActivationStable(clamp, h).project(narrow)
    assert_within(again, narrow, tolerance * narrow.double().norm(dim=-1, keepdim=True))


@guards(
    ActivationStable.project,
    "        active = self.reference != 0\n        held = active\n",
    "        active = self.reference != 0\n        held = active & False\n",
)
@given(pointwise_scenes, st.floats(0, 1))
def test_the_way_back_to_no_delta_stays_feasible(scene: Scene, share: float) -> None:
    """What lets a budget scale any feasible delta down: a feature off at both ends of a segment is off along it."""
    clamp, h, delta = scene.clamp, scene.residual(), scene.delta()
    constraint = ActivationStable(clamp, h)
    projected = constraint.project(delta)
    clear = zero_crossing_margin(clamp, h, move_error(clamp, h, projected))
    ends = zero_crossing_margin(clamp, h + projected, move_error(clamp, h, projected))
    assume((clear & ends).all())
    scaled = share * projected
    tightly = projection_leak(scene.sae.d_model, delta.dtype) * projected.double().norm(dim=-1, keepdim=True)
    bound = slope(clamp.sae.activation, clamp.indices) * tightly * clamp.encoder.double().norm(dim=0)
    bound = bound + drift_error(clamp, h, projected)
    assert (constraint.violation(scaled).double() <= 2 * per_example(bound)).all()


@guards(
    "recover.search.constraints.linear._hold",
    'here = rearrange(which == index, "batch pos -> batch pos 1")',
    'here = rearrange(which <= index, "batch pos -> batch pos 1")',
)
@given(pointwise_scenes)
def test_examples_are_projected_one_by_one(scene: Scene) -> None:
    clamp, h, delta = scene.clamp, scene.residual(), scene.delta()
    assume(zero_crossing_margin(clamp, h, read_by(clamp, delta) * 0 + move_error(clamp, h, delta)).all())
    together = ActivationStable(clamp, h).project(delta)
    assume(zero_crossing_margin(clamp, h + together, move_error(clamp, h, delta)).all())
    tolerance = 2 * projection_leak(scene.sae.d_model, delta.dtype)
    for row in range(delta.shape[0]):
        alone = ActivationStable(clamp, h[row : row + 1]).project(delta[row : row + 1])
        assert_within(alone[0], together[row], tolerance * delta[row].double().norm())


@guards(
    Budget.project,
    "aim = self.eps * (1 - 2 * torch.finfo(delta.dtype).eps)",
    "aim = self.eps * (1 + 2 * torch.finfo(delta.dtype).eps)",
)
@given(
    residual_cases(), st.integers(1, 10), st.sampled_from([torch.float32, torch.float64]), st.integers(-10, 10), BUDGETS
)
def test_a_budget_scales_what_is_longer_and_leaves_the_rest(
    case: ResidualCase, d_model: int, dtype: torch.dtype, power: int, budget: float
) -> None:
    """Within it to the last bit, idempotent, in the same direction, and no shorter than need be."""
    delta, constraint = case.tensor(d_model, dtype) * 10.0**power, Budget(budget)
    clipped = constraint.project(delta)
    assert (constraint.violation(clipped) == 0).all()
    assert torch.equal(constraint.project(clipped), clipped)
    within = norm(delta) <= budget
    assert torch.equal(clipped[within], delta[within])
    factor = (norm(clipped).double() / norm(delta).double().clamp(min=1e-300)).where(norm(delta) > 0, 1.0)
    assert (factor <= 1 + eps(dtype)).all()
    assert_within(clipped, factor[:, None, None] * delta.double(), 4 * eps(dtype) * delta.double().abs() + 1e-44)
    longer = norm(delta) > budget
    assert (norm(clipped)[longer].double() >= budget * (1 - 6 * eps(dtype))).all()


@guards(
    Constraints.project, "for part in sorted(self.parts, key=lambda part: part.stage):", "for part in self.parts[:1]:"
)
@given(pointwise_scenes, BUDGETS, SEEDS)
def test_constraints_together_keep_each_in_whatever_order_they_are_named(
    scene: Scene, budget: float, seed: int
) -> None:
    clamp, h, delta = scene.clamp, scene.residual(), scene.delta()
    parts: list[Constraint] = [*constraints_of(clamp, h).values(), Budget(budget)]
    order = torch.randperm(len(parts), generator=torch.Generator().manual_seed(seed)).tolist()
    projected = Constraints(tuple(parts[index] for index in order)).project(delta)
    clear = zero_crossing_margin(clamp, h, read_by(clamp, projected) + move_error(clamp, h, projected))
    assume(clear.all())
    tightly = 2 * projection_leak(scene.sae.d_model, delta.dtype) * projected.double().norm(dim=-1, keepdim=True)
    leak = tightly * clamp.encoder.double().norm(dim=0)
    drift = per_example(slope(clamp.sae.activation, clamp.indices) * leak + drift_error(clamp, h, projected))
    bounds = [per_example(leak), drift, drift * clamp.decoder.double().norm() * 2, torch.zeros(len(delta))]
    for part, bound in zip(parts, bounds, strict=True):
        assert (part.violation(projected).double() <= 2 * bound).all(), part
    assert short(projected, delta, max(scene.sae.d_model, scene.sae.d_sae)).all()
    worst = torch.stack([part.violation(delta) for part in parts]).amax(dim=0)
    assert torch.equal(Constraints(tuple(parts)).violation(delta), worst)


@guards(EncoderOrthogonal.violation, "return norm(seen).to(delta.dtype)", "return norm(seen).square().to(delta.dtype)")
@given(scenes(), st.integers(-8, 8))
def test_the_violation_of_c1_is_a_norm(scene: Scene, power: int) -> None:
    """Twice the delta violates it twice as much, to the bit; and so does its negative."""
    clamp, delta = scene.clamp, scene.delta()
    constraint = EncoderOrthogonal.of(clamp)
    violated = constraint.violation(delta)
    assert torch.equal(constraint.violation(-(2.0**power) * delta), 2.0**power * violated)
    other = randn(*delta.shape, seed=scene.x.seed + 2, dtype=delta.dtype)
    summed = constraint.violation(delta + other).double()
    rounded = 4 * eps(delta.dtype) * clamp.encoder.double().norm() * (per_example(delta) + per_example(other))
    assert (summed <= violated.double() + constraint.violation(other).double() + rounded).all()


@dataclass(frozen=True)
class StackCase:
    """Blocks that are linear, positions mixed, and a clamp before each: at site 1 and at one or two later ones.

    What arrives at a later site is a linear function of delta, plus what the clamps between write.
    """

    architectures: tuple[str, ...]
    modes: tuple[str, ...]
    k: int
    n_pos: int
    geometry: str
    d_model: int
    seed: int

    @property
    def prompts(self) -> Prompts:
        ids = torch.randint(5, (3, self.n_pos + 2), generator=torch.Generator().manual_seed(self.seed))
        return Prompts(ids, torch.ones_like(ids, dtype=torch.bool))

    @property
    def behavior(self) -> LogitDifference:
        return LogitDifference(torch.tensor([0, 1, 2]), torch.tensor([3, 4, 0]))

    @cached_property
    def between(self) -> list[tuple[Tensor, Tensor]]:
        """Of each block what it carries from earlier positions, and its map, both about the identity in size."""
        d, seeds = self.d_model, range(len(self.architectures) - 1)
        draws = [randn(2, d, d, seed=self.seed + 10 + s, dtype=torch.float64) / d**0.5 for s in seeds]
        return [(0.4 * carry, torch.eye(d, dtype=torch.float64) + 0.4 * J) for carry, J in draws]

    @cached_property
    def defended(self) -> Defended:
        d = self.d_model
        stack = [nn.Sequential(Gather(carry), Linear(J)) for carry, J in self.between]
        blocks = [Linear(torch.eye(d)), *stack, Linear(torch.eye(d))]
        network = Network(2 * randn(5, d, seed=self.seed), blocks, randn(5, d, seed=self.seed + 1), torch.zeros(5))
        defense = Defense(tuple(self.clamps), skip_first=self.seed % 2)
        model = Model(network.eval().requires_grad_(False))
        return defend(model, defense, self.prompts, self.behavior, n_pos=self.n_pos)

    @cached_property
    def clamps(self) -> list[Clamp]:
        clamps = []
        for at, (architecture, mode) in enumerate(zip(self.architectures, self.modes, strict=True)):
            sae = SAECase(architecture, self.d_model, 8, self.seed + at, geometry=self.geometry).sae()  # type: ignore[arg-type]
            edit = ClampCase((), mode, -1.0, True).edit()
            clamps.append(Clamp(sae, range(self.k), edit, only_active=bool(at % 2), site=Site(1 + at)))
        return clamps

    @cached_property
    def pulled_back(self) -> Tensor:
        """What the clamped features of each site see of a delta, `[pos*d_model pos*k*sites]`, clamps left out."""
        n = self.n_pos * self.d_model
        state = torch.zeros(n, self.n_pos + 2, self.d_model, dtype=torch.float64)
        state[:, -self.n_pos :] = torch.eye(n, dtype=torch.float64).reshape(n, self.n_pos, self.d_model)
        seen = []
        for clamp, block in zip(self.clamps, [None, *self.between], strict=True):
            if block is not None:
                carry, J = block
                for t in reversed(range(1, state.shape[1])):
                    state[:, t] = state[:, t] + state[:, :t].mean(dim=1) @ carry
                state = state @ J.T
            seen.append((state[:, -self.n_pos :] @ clamp.encoder.double()).flatten(1))
        return torch.cat(seen, dim=1)

    def clear(self) -> bool:
        """Whether rounding leaves the rank, and every clamped feature's side of its threshold, beyond doubt."""
        columns = self.pulled_back / self.pulled_back.norm(dim=0).clamp(min=1e-12)
        singular = torch.linalg.svdvals(columns)
        inside = [self.defended.suffix.residual, *self.defended.entering(self.defended.zero_delta).values()]
        gaps = [(c.pre_activations(x) - c.threshold).abs().min() for c, x in zip(self.clamps, inside, strict=True)]
        return bool(((singular < 1e-6) | (singular > 0.03)).all()) and min(gaps) > 1e-2


@st.composite
def stacks(draw: st.DrawFn) -> StackCase:
    sites = draw(st.integers(2, 3))
    return StackCase(
        architectures=tuple(draw(st.lists(st.sampled_from(POINTWISE), min_size=sites, max_size=sites))),
        modes=tuple(draw(st.lists(st.sampled_from(["set", "scale", "floor"]), min_size=sites, max_size=sites))),
        k=draw(st.integers(1, 3)),
        n_pos=draw(st.integers(1, 2)),
        geometry=draw(st.sampled_from(["generic", "generic", "duplicate", "zero"])),
        d_model=draw(st.integers(3, 12)),
        seed=draw(SEEDS),
    )


@guards(JacobianOrthogonal.of, "first.null_space.project(units)", "units")
@guards(Defended.entering, "self.defense.sites[1:])", "self.defense.sites[1:2])")
@costly(30)
@given(stacks())
def test_over_linear_blocks_the_admissible_space_is_that_of_the_encoders_pulled_back(case: StackCase) -> None:
    """`{delta : A_1^T delta = 0, A_m^T J delta = 0}`, whatever the clamps between write: none of them moves.

    In float32 a row errs by some roundings, of its own size and of what the clamps between add to it, and the span of
    the rows by their condition (at most 30) times that.
    """
    assume(case.clear())
    space = admissible(case.defended)
    assert isinstance(space, JacobianOrthogonal)
    basis = row_space(case.pulled_back, rtol=1e-4)
    free = case.n_pos * case.d_model - basis.shape[1]
    assert space.dimensions.tolist() == [free] * 3
    noise = randn(3, case.n_pos, case.d_model, seed=case.seed, dtype=torch.float64)
    expected = noise.flatten(1) - noise.flatten(1) @ basis @ basis.T
    tolerance = 30 * 200 * case.d_model * eps(torch.float32)
    assert_within(space.project(noise).flatten(1), expected, tolerance * noise.flatten(1).norm(dim=1, keepdim=True))
    assert_within(space.violation(space.project(noise)), torch.zeros(3), 1e-3 * norm(noise))


@guards(JacobianOrthogonal.of, "counts = gain > ROUNDING * gain", "counts = gain > 0.9 * gain")
@costly(30)
@given(stacks(), st.sampled_from([0.01, 1.0, 30.0]))
def test_over_linear_blocks_an_admissible_delta_of_any_size_is_held_at_every_site(case: StackCase, size: float) -> None:
    """By the certificate's own replay, and so is every smaller one: what enters a later clamp does not move."""
    assume(case.clear())
    space = admissible(case.defended)
    delta = scale_to(space.project(randn(3, case.n_pos, case.d_model, seed=case.seed)), size)
    model, defense = case.defended.suffix.model, case.defended.defense
    assert certify(model, defense, case.prompts, case.behavior, delta).held.all()
