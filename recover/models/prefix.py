"""Keys and values of positions that a search never changes, held once and reused at every step.

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
    """Keys and values of the prefix: one pair of `[batch head pos d_head]` a layer, None where a layer was skipped."""

    layers: tuple[tuple[Tensor, Tensor] | None, ...]
    length: int

    @classmethod
    def of(cls, cache: Cache, length: int) -> KeysValues:
        """The first `length` positions of what a recorder saw."""
        seen = (
            None if layer.keys is None else (layer.keys[:, :, :length], layer.values[:, :, :length])
            for layer in cache.layers
        )
        return cls(tuple(seen), length)

    def select(self, rows: Rows) -> KeysValues:
        """The same for the examples `rows`."""
        picked = (None if pair is None else (_rows(pair[0], rows), _rows(pair[1], rows)) for pair in self.layers)
        return KeysValues(tuple(picked), self.length)


def _rows(kept: Tensor, rows: Rows) -> Tensor:
    """Of what is where its layer is, which may be another device than the rows'."""
    return kept[rows.to(kept.device)]


class StoredLayer(DynamicLayer):
    """A layer whose past is fixed: `update` returns past and new, and keeps the past.

    A layer below the start of a suffix is never run; it has no keys, but must tell its length like the others.
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
    """An empty cache that keeps every position of every layer it meets, sliding-window layers included."""
    return Cache(layers=[DynamicLayer() for _ in range(n_layers)])


def stored(past: KeysValues, n_layers: int) -> Cache:
    """The prefix as a cache that can be used any number of times."""
    layers = past.layers + (None,) * (n_layers - len(past.layers))
    return Cache(layers=[StoredLayer(pair, past.length) for pair in layers])
