"""A pretended accelerator: tensors of another device, computed on the CPU, that refuse to meet the CPU's own.

Where no GPU is at hand it shows what a GPU would: that a tensor was made on the wrong device. It registers PyTorch's
spare backend under the name `pretend`, so that it is used in a process of its own:

    python -m tests.pretend check DEFENSE.yaml --out DIR      # any command of `recover`, its model on that device

As on CUDA, numbers without dimensions may meet anything, and what is on the device may be indexed from the CPU.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

DEVICE = "pretend:0"
INDEXING = ("index", "index_put", "index_put_", "_unsafe_index")
MOVING = ("copy_", "_to_copy")


class Pretend(torch.Tensor):
    """A tensor that says that it is elsewhere; its numbers are `there`, on the CPU."""

    there: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, there: torch.Tensor) -> Pretend:
        made: Pretend = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            there.size(),
            strides=there.stride(),
            storage_offset=there.storage_offset(),
            dtype=there.dtype,
            device=torch.device(DEVICE),
        )
        made.there = there
        return made

    def tolist(self) -> Any:
        return self.there.tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError("a tensor on the pretended device has no array; use .cpu() first")

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name, device = func.overloadpacket.__name__, kwargs.get("device")
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        strangers = [tensor for tensor in tensors if not isinstance(tensor, Pretend) and tensor.ndim > 0]
        if name in INDEXING and isinstance(args[0], Pretend):
            strangers = [tensor for tensor in strangers if not any(tensor is index for index in args[1])]
        if strangers and name not in MOVING:
            raise RuntimeError(f"expected all tensors on one device: {func} was given some of {DEVICE} and some of cpu")
        plain_args, plain = tree_map(_plain, args), tree_map(_plain, kwargs)
        if device is not None:
            plain["device"] = "cpu"
        found = func(*plain_args, **plain)
        written = any(one.alias_info and one.alias_info.is_write for one in func._schema.returns)
        if name == "_local_scalar_dense":
            return found
        if written:
            target = kwargs.get("out", args[0])
            if target.shape != _plain(target).shape:
                raise NotImplementedError(f"{func} gave its output another shape, which no wrapper can follow")
            return target
        here = device is not None and torch.device(device).type == "cpu"
        return found if here else tree_map(lambda one: Pretend(one) if isinstance(one, torch.Tensor) else one, found)


def _plain(value: Any) -> Any:
    return value.there if isinstance(value, Pretend) else value


class _Backend(_DummyBackendModule):
    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        """All draws are made on the CPU."""


def register() -> torch.library.Library:
    """Make the device known to PyTorch, for good; what is given must be kept."""
    _setup_privateuseone_for_python_backend("pretend", backend_module=_Backend())
    library = torch.library.Library("aten", "IMPL")

    def makes(name: str, make: Any) -> None:
        def there(*args: Any, dtype: Any = None, **_: Any) -> Pretend:
            return Pretend(make(*args, dtype=dtype))

        library.impl(name, there, "PrivateUse1")

    def copied(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        _plain(target).copy_(_plain(source))
        return target

    makes("empty.memory_format", torch.empty)
    makes("empty_strided", torch.empty_strided)
    makes("_efficientzerotensor", torch.zeros)
    for overload in ("arange", "arange.start", "arange.start_step"):
        makes(overload, torch.arange)
    library.impl("_copy_from", copied, "PrivateUse1")
    return library


def main(arguments: Sequence[str]) -> int:
    """A command of `recover` on the pretended device, whatever device it names."""
    kept = register()
    from recover import cli
    from recover.models import names  # after the device is known

    names.resolve_device = lambda device: torch.device(DEVICE)
    status = cli.main(arguments)
    del kept
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
