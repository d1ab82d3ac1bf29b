"""A model that is split over two devices, as several cards hold one: the lower blocks on one, the rest on the other.

python -m tests.split      # the laws of `recover verify` on one that is split between the CPU and a pretended device
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from tests.models import blocks_of


def split(module: Any, first: int, device: torch.device | str) -> Any:
    """Move the blocks from `first` on, and what follows them, to a device; each takes its inputs there."""

    def there(value: Any) -> Any:
        return value.to(device) if isinstance(value, torch.Tensor) else value

    for part in (*list(blocks_of(module))[first:], module.model.norm, module.lm_head):
        moved(part, device)
        part.register_forward_pre_hook(lambda _, args, kwargs: tree_map(there, (args, kwargs)), with_kwargs=True)
    return module


def moved(module: nn.Module, device: torch.device | str) -> None:
    """In place; `module.to` cannot change what kind of tensor a parameter is."""
    for part in module.modules():
        for name, weight in part.named_parameters(recurse=False):
            part._parameters[name] = nn.Parameter(weight.data.to(device), requires_grad=False)
        for name, value in part.named_buffers(recurse=False):
            part._buffers[name] = value.to(device)


def main() -> int:
    """Print each law that does not hold, of a model that is split below, at and above the site."""
    from tests import pretend

    kept = pretend.register()
    from recover.checks.verification import verify
    from recover.models.host import Model
    from tests.models import left_padded, tiny_lm
    from tests.test_verify import ROWS, sae

    broken = 0
    for first in (1, 2, 3):
        module = split(tiny_lm(scale=4.0), first, pretend.DEVICE)
        for law in verify(Model(module), sae(), left_padded(ROWS)):
            if law.holds is not True:
                broken += 1
                print(f"split at block {first}: {law.name}: {law.detail}")
    del kept
    return int(broken > 0)


if __name__ == "__main__":
    sys.exit(main())
