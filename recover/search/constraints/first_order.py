"""The deltas that leave every clamped feature of a defense as it is: at one site exactly, at several to first order.

A delta enters at the first clamped site. Over one site the admissible deltas are the null space of the clamped encoder
columns (C1). A later site sees what the blocks between make of a delta, so that over several sites a delta must keep
out of the row space of a Jacobian as well:

1. *Rows*. For each example, each perturbed position and each clamped feature of a later site, the gradient with respect
   to delta, at delta = 0 and with the clamps below live, of the feature's pre-activation as it *enters* the clamp.
   Where none of a site's moves there, its clamp writes what it wrote before. (After the clamp a value that is set would
   hide every move of an active feature, though not from the sites above.)
2. *Units*. Each row is divided by its length. A row of next to no gain, beside others, is rounding and is left out:
   scaled up, it would cost a direction for nothing.
3. *Null space*. What C1 leaves of the rows is given an orthonormal basis for each example, in float64. Singular values
   at the rounding of float32 back-propagation count as zero: that row depends on others, or on C1.
4. *Project*: onto C1, then onto the complement of that basis, which lies within C1.

Between linear blocks this is exact. Through others a clamped feature of a later site moves by the second order of
delta; the certificate measures it. Rows are as precise as the model that they were taken from: use it in float32.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import partial

import torch
from einops import einsum, rearrange, repeat

from recover.defenses.defended import Defended
from recover.numerics.metrics import by_example, norm
from recover.numerics.subspaces import NullSpaces
from recover.search.constraints.linear import Constraint, EncoderOrthogonal
from recover.types import Float, Int, PerExample, Residual, Rows, Tensor

ROUNDING = 1e-5
"""Share of the largest gain, and of a row of unit length, up to which what back-propagation gives is rounding."""
ELEMENTS_AT_ONCE = 2**18
"""Numbers in the gradients of one backward pass."""

Gradients = Float[Tensor, "batch row pos d_model"]


def admissible(
    defended: Defended, *, write_orthogonal: bool = False, written: Float[Tensor, "d_model written"] | None = None
) -> EncoderOrthogonal | JacobianOrthogonal:
    """The linear space of deltas, for each example, under which no clamped feature of any site moves.

    Args:
        defended: a defense put into a model; in float32 where it has several sites.
        write_orthogonal: C1+, orthogonal also to what the clamped features of the first site write, so that a delta
            cannot be the clamp undone.
        written: directions along which that clamp wrote; by default all decoders of the clamped features.

    Returns:
        C1 where one site is clamped; where several are, C1 at the first and the rows of the Jacobian of the others.
    """
    clamps = defended.defense.at(defended.defense.sites[0])
    first = EncoderOrthogonal.of(*clamps)
    if write_orthogonal:
        wrote = torch.cat([clamp.decoder.mT for clamp in clamps], dim=1) if written is None else written
        first = EncoderOrthogonal(torch.cat([first.directions, wrote.to(first.directions)], dim=1))
    later = [clamp for site in defended.defense.sites[1:] for clamp in defended.defense.at(site)]
    if not later:
        return first
    read = [repeat(clamp.encoder.norm(dim=0), "k -> (pos k)", pos=defended.suffix.n_pos) for clamp in later]
    return JacobianOrthogonal.of(first, jacobian(defended), torch.cat(read))


def jacobian(defended: Defended) -> Gradients:
    """The gradients of the clamped pre-activations of all later sites (1 above), by site, clamp, position, feature."""
    leaf = defended.zero_delta.requires_grad_(True)
    with torch.enable_grad():
        entering = defended.entering(leaf).items()
        read = [clamp.pre_activations(state) for site, state in entering for clamp in defended.defense.at(site)]
        # Examples do not see each other, so that the gradient of a sum over them holds the row of each.
        total = torch.cat([rearrange(pre, "batch pos k -> batch (pos k)") for pre in read], dim=1).sum(dim=0)
    return rearrange(_gradients(total, leaf), "row batch pos d_model -> batch row pos d_model")


def _gradients(outputs: Float[Tensor, "row"], leaf: Residual) -> Float[Tensor, "row batch pos d_model"]:
    """The gradient of each output, several in one backward pass where every operation of the model allows it."""
    at_once = max(1, ELEMENTS_AT_ONCE // max(leaf.numel(), 1))
    one_hot = torch.eye(len(outputs), dtype=outputs.dtype, device=outputs.device)
    try:
        with warnings.catch_warnings():
            # An operation that is run one row at a time is as good as the loop below.
            warnings.filterwarnings("ignore", message="There is a performance drop")
            several = partial(torch.autograd.grad, outputs, leaf, retain_graph=True, is_grads_batched=True)
            return torch.cat([several(some)[0] for some in torch.split(one_hot, at_once)])
    except RuntimeError:
        return torch.stack([torch.autograd.grad(output, leaf, retain_graph=True)[0] for output in outputs])


@dataclass(frozen=True, eq=False)
class JacobianOrthogonal(Constraint):
    """C1 at the first site, and at every later one `J delta = 0` with the example's own Jacobian.

    Attributes:
        first: C1, or C1+.
        rows: `J`, in units of pre-activation.
        later: the complement of the row space that C1 leaves, over positions and dimensions together.
    """

    first: EncoderOrthogonal
    rows: Gradients
    later: NullSpaces

    @classmethod
    def of(cls, first: EncoderOrthogonal, rows: Gradients, read: Float[Tensor, "row"]) -> JacobianOrthogonal:
        """From C1 and the rows of a Jacobian (2 and 3 above).

        Args:
            first: C1, or C1+.
            rows: the Jacobian. A row that is not finite is left out; a search meets the same gradient, and says so.
            read: norm of the encoder column that each row is of.
        """
        wide = torch.where(rows.isfinite().all(dim=(2, 3), keepdim=True), rows.double(), 0.0)
        lengths = torch.linalg.vector_norm(wide, dim=(2, 3))
        gain = torch.where(lengths > 0, lengths / read.double(), 0.0)
        counts = gain > ROUNDING * gain.amax(dim=1, keepdim=True)
        units = wide * rearrange(torch.where(counts, 1 / lengths, 0.0), "batch row -> batch row 1 1")
        left = rearrange(first.null_space.project(units), "batch row pos d_model -> batch (pos d_model) row")
        return cls(first, rows, NullSpaces.of(left, atol=ROUNDING))

    @property
    def dimensions(self) -> Int[Tensor, "batch"]:
        """How many directions are left free in each example."""
        return self.first.null_space.dimension * self.rows.shape[2] - self.later.ranks

    def project(self, delta: Residual) -> Residual:
        """The nearest delta in each example's space; exactly zero where nothing is free."""
        C1, pos = self.first.null_space, delta.shape[1]
        free = rearrange(C1.project(delta.double()), "batch pos d_model -> batch (pos d_model)")
        free = rearrange(self.later.project(free), "batch (pos d_model) -> batch pos d_model", pos=pos)
        # Once more: an error relative to what the Jacobian took away is large where little is left.
        open_ = by_example(self.dimensions > 0)
        return torch.where(open_, C1.project(free), 0.0).to(delta.dtype)

    def violation(self, delta: Residual) -> PerExample:
        """How far clamped pre-activations move, all sites together, in float64: the later ones to first order."""
        later = einsum(delta.double(), self.rows.double(), "batch pos d_model, batch row pos d_model -> batch row")
        both = torch.stack([self.first.violation(delta.double()), norm(later)], dim=1)
        return norm(both).to(delta.dtype)

    def select(self, rows: Rows) -> JacobianOrthogonal:
        return JacobianOrthogonal(self.first, self.rows[rows], self.later.select(rows))
