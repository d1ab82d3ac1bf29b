"""A fixed prefix: keys and values of positions that a search never changes, computed once and reused at every step.

transformers' own caches grow as they are used and, for sliding-window layers, forget. A search needs the opposite:
the same prefix at every step, and every earlier position, with the attention mask alone deciding what a window
shows. `HeldLayer` therefore returns prefix and new tokens together and stores nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache, DynamicLayer

from recover.types import Rows, Tensor


@dataclass(frozen=True, eq=False)
class KeysValues:
    """Keys and values of the prefix: a pair of `[batch head pos d_head]` per layer, None where a layer was skipped."""

    layers: tuple[tuple[Tensor, Tensor] | None, ...]
    length: int

    @classmethod
    def of(cls, cache: Cache, length: int) -> KeysValues:
        """Take the first `length` positions from a cache that `recorder` made."""
        seen = (
            None if layer.keys is None else (layer.keys[:, :, :length], layer.values[:, :, :length])
            for layer in cache.layers
        )
        return cls(tuple(seen), length)

    def select(self, rows: Rows) -> KeysValues:
        """Select a subset of examples."""
        picked = (None if pair is None else (_rows(pair[0], rows), _rows(pair[1], rows)) for pair in self.layers)
        return KeysValues(tuple(picked), self.length)


def _rows(kept: Tensor, rows: Rows) -> Tensor:
    """Select rows of a tensor that may be on another device than `rows`."""
    return kept[rows.to(kept.device)]


class StoredLayer(DynamicLayer):
    """A cache layer with a fixed past: `update` returns past and new tokens together, and stores nothing.

    A layer below the start of a suffix is never run; it has no keys but must report its length.
    """

    def __init__(self, pair: tuple[Tensor, Tensor] | None, length: int) -> None:
        super().__init__()
        self.length = length
        self.is_initialized = True
        if pair is not None:
            self.keys, self.values = pair
            self.dtype, self.device = pair[0].dtype, pair[0].device

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        return torch.cat([self.keys, key_states], dim=-2), torch.cat([self.values, value_states], dim=-2)

    def get_seq_length(self) -> int:
        return self.length


def recorder(n_layers: int) -> Cache:
    """Make an empty cache that keeps every position of every layer, sliding-window layers included."""
    return Cache(layers=[DynamicLayer() for _ in range(n_layers)])


def stored(past: KeysValues, n_layers: int) -> Cache:
    """Make a cache of the prefix that can be used any number of times."""
    layers = past.layers + (None,) * (n_layers - len(past.layers))
    return Cache(layers=[StoredLayer(pair, past.length) for pair in layers])
