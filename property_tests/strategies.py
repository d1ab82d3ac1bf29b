"""What the laws are drawn over.

Only plain values are drawn (names, sizes, seeds), into small frozen dataclasses; tensors are made from them. A failing
example therefore prints as a line that can be pasted into a unit test: `SAECase(...).sae()` is the SAE that failed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import sae_lens
import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from torch import Tensor

from recover.defenses.clamps import Clamp, Defense, Floor, Mode, Scale, Set
from recover.saes.sae import SAE, from_sae_lens
from tests.saes import POINTWISE, random_sae

COMPETING = ("topk", "abstopk")
ARCHITECTURES = (*POINTWISE, *COMPETING)
SEEDS = st.integers(0, 2**16 - 1)
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
EPS64 = torch.finfo(torch.float64).eps


def costly(ci: int = 6) -> settings:
    """For laws that run a model: `ci` examples in the quick profile, and as many as all others in `thorough`.

    In the quick one a failing example is shown as it was drawn: to shrink it would take minutes.
    """
    chosen = settings().max_examples
    if chosen >= 1000:
        return settings(max_examples=chosen)
    return settings(max_examples=ci, phases=[Phase.explicit, Phase.reuse, Phase.generate])


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal draws, the same ones in every dtype, up to rounding."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@dataclass(frozen=True)
class SAECase:
    """An SAE as sae_lens would have saved it (`stored`), and the dtype in which it computes.

    `geometry` makes its encoder columns degenerate: the second equal to the first, the first zero, or the third the sum
    of the first two.
    """

    architecture: str
    d_model: int
    d_sae: int
    seed: int
    apply_b_dec_to_input: bool = True
    rescale_acts_by_decoder_norm: bool = False
    k: int = 1
    stored: str = "float32"
    dtype: str = "float32"
    geometry: Literal["generic", "duplicate", "zero", "dependent"] = "generic"

    def module(self) -> sae_lens.SAE[Any]:
        """The SAE in sae_lens's own words, afresh: `to` and `load_state_dict` change a module in place."""
        return _module(self)

    def sae(self, dtype: torch.dtype | None = None) -> SAE:
        """The SAE as the code under test has it."""
        return _sae(self, dtype or DTYPES[self.dtype])


def _module(case: SAECase) -> sae_lens.SAE[Any]:
    options: dict[str, Any] = {"apply_b_dec_to_input": case.apply_b_dec_to_input}
    if case.architecture in COMPETING:
        options |= {"k": case.k, "rescale_acts_by_decoder_norm": case.rescale_acts_by_decoder_norm}
    sae = random_sae(case.architecture, seed=case.seed, d_model=case.d_model, d_sae=case.d_sae, **options)
    with torch.no_grad():
        if case.geometry == "duplicate":
            sae.W_enc[:, 1] = sae.W_enc[:, 0]
        elif case.geometry == "zero":
            sae.W_enc[:, 0] = 0
        elif case.geometry == "dependent":
            sae.W_enc[:, 2] = sae.W_enc[:, 0] + sae.W_enc[:, 1]
    return sae.to(dtype=DTYPES[case.stored]).requires_grad_(False)


@lru_cache(maxsize=256)
def _sae(case: SAECase, dtype: torch.dtype) -> SAE:
    return from_sae_lens(_module(case), dtype=dtype)


@st.composite
def sae_cases(
    draw: st.DrawFn,
    architectures: tuple[str, ...] = ARCHITECTURES,
    dtypes: tuple[str, ...] = ("float32", "float64"),
    geometries: tuple[str, ...] = ("generic", "generic", "duplicate", "zero", "dependent"),
) -> SAECase:
    """Every supported architecture with every option, from one dimension and three features up."""
    architecture, d_sae = draw(st.sampled_from(architectures)), draw(st.integers(3, 14))
    competing = architecture in COMPETING
    return SAECase(
        architecture=architecture,
        d_model=draw(st.integers(1, 10)),
        d_sae=d_sae,
        seed=draw(SEEDS),
        apply_b_dec_to_input=draw(st.booleans()),
        rescale_acts_by_decoder_norm=competing and draw(st.booleans()),
        k=draw(st.integers(1, d_sae)) if competing else 1,
        stored=draw(st.sampled_from(list(DTYPES))),
        dtype=draw(st.sampled_from(dtypes)),
        geometry=draw(st.sampled_from(geometries)),  # type: ignore[arg-type]
    )


@dataclass(frozen=True)
class ResidualCase:
    """Residuals `[batch pos d_model]`; prompts are as long as `lengths` say, left-padded."""

    lengths: tuple[int, ...]
    seed: int
    kind: Literal["normal", "zero", "huge", "tiny", "duplicate"] = "normal"

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.lengths), max(self.lengths)

    def tensor(self, d_model: int, dtype: torch.dtype = torch.float32, salt: int = 0) -> Tensor:
        """Twice a normal draw; `huge` as a first token's (float16 holds less), `duplicate` the same at every place."""
        values = 2 * randn(*self.shape, d_model, seed=self.seed + salt, dtype=dtype)
        if self.kind == "duplicate":
            return values[:1, :1].expand(*self.shape, d_model).clone()
        most = torch.finfo(dtype).max / 4
        return (values * {"normal": 1.0, "zero": 0.0, "huge": 1e4, "tiny": 1e-4}[self.kind]).clamp(-most, most)

    def mask(self) -> Tensor:
        """Which positions are real."""
        width = max(self.lengths)
        return torch.tensor([[column >= width - length for column in range(width)] for length in self.lengths])


KINDS = ("normal", "normal", "zero", "huge", "tiny", "duplicate")


@st.composite
def residual_cases(draw: st.DrawFn, kinds: tuple[str, ...] = KINDS) -> ResidualCase:
    """From one example of one position up."""
    lengths = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    return ResidualCase(tuple(lengths), draw(SEEDS), draw(st.sampled_from(kinds)))  # type: ignore[arg-type]


MODES: dict[str, type[Set] | type[Scale] | type[Floor]] = {"set": Set, "scale": Scale, "floor": Floor}


@dataclass(frozen=True)
class ClampCase:
    """A clamp without its SAE."""

    features: tuple[int, ...]
    mode: str
    value: float
    only_active: bool
    positions: str = "all"

    def edit(self) -> Mode:
        return MODES[self.mode](self.value)

    def clamp(self, sae: SAE) -> Clamp:
        return Clamp(sae, self.features, self.edit(), self.only_active, self.positions)  # type: ignore[arg-type]


VALUES = st.sampled_from([-5.0, -1.0, 0.0, 0.5, 1.0, 3.0]) | st.floats(-20, 20, width=32, allow_subnormal=False)


@st.composite
def clamp_cases(
    draw: st.DrawFn,
    d_sae: int,
    modes: tuple[str, ...] = tuple(MODES),
    positions: tuple[str, ...] = ("all", "last", "prompt"),
    only_active: bool | None = None,
    among: tuple[int, ...] | None = None,
) -> ClampCase:
    """Any non-empty set of features, in any order."""
    pool = list(range(d_sae)) if among is None else list(among)
    features = draw(st.lists(st.sampled_from(pool), min_size=1, max_size=len(pool), unique=True))
    return ClampCase(
        tuple(features),
        draw(st.sampled_from(modes)),
        draw(VALUES),
        draw(st.booleans()) if only_active is None else only_active,
        draw(st.sampled_from(positions)),
    )


@dataclass(frozen=True)
class Scene:
    """An SAE, residuals and clamps of disjoint features at one site."""

    sae: SAECase
    x: ResidualCase
    clamps: tuple[ClampCase, ...]

    @property
    def clamp(self) -> Clamp:
        """The first clamp."""
        return self.clamps[0].clamp(self.sae.sae())

    @property
    def defense(self) -> Defense:
        """All of them."""
        sae = self.sae.sae()
        return Defense(tuple(clamp.clamp(sae) for clamp in self.clamps))

    def residual(self) -> Tensor:
        return self.x.tensor(self.sae.d_model, DTYPES[self.sae.dtype])

    def delta(self) -> Tensor:
        """A perturbation of the residual, about half its size."""
        return 0.5 * self.x.tensor(self.sae.d_model, DTYPES[self.sae.dtype], salt=1)


@st.composite
def scenes(
    draw: st.DrawFn,
    architectures: tuple[str, ...] = ARCHITECTURES,
    dtypes: tuple[str, ...] = ("float32", "float64"),
    geometries: tuple[str, ...] = ("generic", "generic", "duplicate", "zero", "dependent"),
    kinds: tuple[str, ...] = KINDS,
    clamps: int = 1,
    **options: Any,
) -> Scene:
    """`clamps` clamps of disjoint features; `options` as of `clamp_cases`."""
    sae = draw(sae_cases(architectures, dtypes, geometries))
    parts = [tuple(range(index, sae.d_sae, clamps)) for index in range(clamps)]
    drawn = tuple(draw(clamp_cases(sae.d_sae, among=part, **options)) for part in parts)
    return Scene(sae, draw(residual_cases(kinds)), drawn)
