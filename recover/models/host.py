"""The engine: read and edit any model with a stack of residual blocks, through nnsight.

1. *Read*: one forward pass gives the residual stream at any number of sites.
2. *Prefill*: starting from a residual at a site (lower blocks skipped), one pass over whole prompts gives the
   next-token logits and every upper block's keys and values.
3. *Suffix*: with the keys and values of the unperturbed positions held, only the last `n_pos` positions run
   through the upper blocks. This is all that a search step costs. It is exact: in a causal model nothing
   before a perturbed position depends on it.

All three are one function, `Model.run`, which differs only in where it starts, what it reads and what it edits.
This is the only module that imports nnsight.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

try:  # nnsight puts `save` on every object, after which these classes can no longer be made
    from anyio.abc import SocketAttribute  # noqa: F401
    from anyio.streams.file import FileStreamAttribute  # noqa: F401
    from anyio.streams.tls import TLSAttribute  # noqa: F401
except ImportError:
    pass

import nnsight
import torch
from einops import einsum, rearrange, repeat
from torch import nn

from recover.models.capacity import prompts_at_once
from recover.models.components import Component, modules_of
from recover.models.prefix import KeysValues, recorder, stored
from recover.types import Bool, Float, InputError, Int, Mask, Residual, Rows, Site, Tensor, TokenIds

Edit = Callable[[Tensor, Tensor], Tensor]
"""`edit(residual [batch pos d_model], positions [batch pos]) -> residual`, pure; positions as `Prompts` counts them."""

Change = Callable[[Tensor], Tensor]
"""`change(residual [batch n_pos d_model]) -> residual`, pure."""

ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
"""transformers' names of layers whose whole state is keys and values."""


@dataclass(frozen=True, eq=False)
class Prompts:
    """Tokenized prompts, left-padded so that each ends at the last position; `mask` marks the real tokens."""

    ids: TokenIds
    mask: Mask

    @classmethod
    def padded(cls, rows: Sequence[list[int]], device: torch.device) -> Prompts:
        """Pad token ids on the left, with token 0."""
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows], device=device)
        mask = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows], device=device)
        return cls(ids, mask)

    def __len__(self) -> int:
        return int(self.ids.shape[0])

    @property
    def positions(self) -> TokenIds:
        """Position `[batch pos]` of each token in its own prompt, counted from 0; -1 for padding."""
        return positions_of(self.mask)

    def select(self, rows: Rows) -> Prompts:
        """Select a subset of prompts, and drop padding that only the others needed."""
        ids, mask = self.ids[rows], self.mask[rows]
        start = 0 if len(rows) == 0 else int(mask.any(dim=0).long().argmax())
        return Prompts(ids[:, start:], mask[:, start:])


@dataclass(frozen=True, eq=False)
class Run:
    """The result of one forward pass: logits, by default at the last position, and residuals by site."""

    logits: Float[Tensor, "batch ..."]
    residuals: Mapping[Site, Tensor] = field(default_factory=dict)


class Model:
    """A loaded model with a stack of residual blocks, whose weights are never changed.

    Args:
        module: any causal language model that transformers loads, or any `torch.nn.Module` that maps `input_ids`
            through one stack of blocks to logits `[batch pos vocab]`.
        tokenizer: only needed by `tokenize`.
        blocks: the module path of the stack, such as `model.layers`; by default it is found automatically.

    Raises:
        InputError: no stack of blocks was found, or two that feed each other (an encoder and a decoder).
    """

    def __init__(self, module: nn.Module, tokenizer: Any = None, *, blocks: str | None = None) -> None:
        if bool(getattr(getattr(module, "config", None), "is_encoder_decoder", False)):
            raise InputError(
                f"model: {type(module).__name__} has an encoder and a decoder, and what one writes the other reads, so "
                "that a site in the encoder has no suffix of its own; give a decoder-only model"
            )
        self.module, self.tokenizer = module, tokenizer
        self.blocks_path = blocks if blocks is not None else find_blocks(module)
        self._traced = nnsight.NNsight(module)
        self._blocks = self._traced.get(self.blocks_path)
        self.n_layers = len(module.get_submodule(self.blocks_path))  # type: ignore[arg-type]
        found = cast(Any, module).get_output_embeddings() if hasattr(module, "get_output_embeddings") else None
        self._head: nn.Linear | None = found if isinstance(found, nn.Linear) else None
        self._head_path = next((name for name, m in module.named_modules() if m is self._head), "")
        self.is_language_model = hasattr(module, "prepare_inputs_for_generation")
        self.recurrent = self.is_language_model and is_recurrent(module)
        self._keeps_logits = "logits_to_keep" in inspect.signature(cast(Any, module).forward).parameters
        self._block_returns_tuple: bool | None = None

    @property
    def device(self) -> torch.device:
        """The device of the first weights."""
        return next(self.module.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The floating type of the weights."""
        return next(self.module.parameters()).dtype

    @property
    def d_model(self) -> int:
        """Width of the residual stream.

        Raises:
            InputError: the module's configuration has no `hidden_size`.
        """
        width = getattr(getattr(self.module, "config", None), "hidden_size", None)
        if width is None:
            raise InputError("model: its configuration has no `hidden_size`; set it on `module.config`")
        return int(width)

    def tokenize(self, texts: Sequence[str]) -> Prompts:
        """Tokenize texts into left-padded prompts, with a BOS token if the tokenizer adds one.

        Raises:
            InputError: there is no text, a text has no token, or the model has no tokenizer.
        """
        if self.tokenizer is None:
            raise InputError("model: it was wrapped without a tokenizer; pass `Model(module, tokenizer)`")
        rows = [self.tokenizer(text)["input_ids"] for text in texts]
        if not rows or not all(rows):
            raise InputError("prompts: there is no prompt, or an empty one; give at least one token each")
        return Prompts.padded(rows, self.device)

    def batch_size(self, prompts: Prompts, d_sae: int = 0) -> int:
        """Number of these prompts to run at once with an SAE of width `d_sae` (see `recover.models.capacity`).

        It is 1 for a recurrent model, whose state would absorb the padding of shorter prompts.
        """
        config, pos = getattr(self.module, "config", None), int(prompts.ids.shape[1])
        devices = {weight.device for weight in self.module.parameters() if not weight.is_meta}
        fitting = (
            prompts_at_once(config, n_layers=self.n_layers, d_model=self.d_model, d_sae=d_sae, pos=pos, device=device)
            for device in devices
        )
        return 1 if self.recurrent else min(fitting)

    def check_site(self, site: Site) -> None:
        """Check that the model has the block of a site.

        Raises:
            InputError: it has not.
        """
        if not 0 <= site.layer < self.n_layers:
            raise InputError(
                f"site {site.hook_name}: the model has {self.n_layers} blocks; layer must be 0 to {self.n_layers - 1}"
            )

    def run(
        self,
        prompts: Prompts,
        *,
        read: Sequence[Site] = (),
        edits: Mapping[Site, Edit] | None = None,
        start: tuple[Site, Residual] | None = None,
        past: tuple[Any, Bool[Tensor, "batch past"] | None] | None = None,
        tokens: Int[Tensor, "batch choice"] | None = None,
        reads: int | None = 1,
        parts: Mapping[Component, Change] | None = None,
    ) -> Run:
        """Run one forward pass, with optional readings and edits.

        Args:
            prompts: the tokens to run; with `past`, the tokens that follow it.
            read: sites whose residual `[batch pos d_model]` is returned, after any edit there.
            edits: pure edits of the residual, by site.
            start: skip every block below this site and insert this residual there.
            past: keys and values of earlier tokens, in a transformers cache, and a mask of the real ones among these
                tokens (None for an empty cache that is to be filled).
            tokens: token ids whose logits are computed, per example; by default the whole vocabulary.
            reads: compute logits at this many last positions; None for every position.
            parts: pure changes (or readings) of the outputs of components, `[batch pos width]`.

        Returns:
            Logits `[batch vocab]` or `[batch choice]` at the last position, or `[batch pos vocab]` or
            `[batch pos choice]` where `reads` is not 1; and the residuals of `read`.

        Raises:
            InputError: a site or component is not among the blocks that run.
        """
        first = 0 if start is None else start[0].index
        changes = {site.index: edit for site, edit in (edits or {}).items()}
        wanted = {site.index for site in read}
        for site in (*read, *(edits or {}), *([start[0]] if start else [])):
            self.check_site(site)
        places = self._places(parts or {}, first)
        as_tuple = self.returns_tuples if first > 0 or self.n_layers in wanted | changes.keys() else False
        found: dict[int, Tensor] = {}
        cache, seen = past or (None, None)
        real = prompts.mask if seen is None else torch.cat([seen, prompts.mask], dim=1)
        positions = positions_of(real)[:, -prompts.ids.shape[1] :]
        inputs = self._inputs(prompts, real, positions, cache)
        if self._keeps_logits and reads is not None:
            inputs["logits_to_keep"] = reads
        with self._traced.trace(**inputs):
            if start is not None:
                for block in range(first):
                    self._blocks[block].skip((start[1],) if as_tuple else start[1])
            for index in range(first, self.n_layers):
                replaced = start is not None and index == first
                if replaced or index in changes or index in wanted:
                    h = self._blocks[index].input if start is None or not replaced else self._entering(index, start[1])
                    if index in changes:
                        h = self._edited(changes[index], h, positions)
                    if index in changes or (replaced and index == 0):
                        self._blocks[index].input = h
                    if index in wanted:
                        found[index] = h
                for path, kind, change in places.get(index, ()):
                    module = self._traced.get(path)
                    if kind == "heads":
                        module.input = self._changed(change, module.input)
                    elif kind == "pattern":
                        self._changed(change, module.output[1])
                    else:
                        module.output = self._changed(change, module.output)
            if self.n_layers in changes or self.n_layers in wanted:
                output = self._blocks[self.n_layers - 1].output
                h = output[0] if as_tuple else output
                if self.n_layers in changes:
                    h = self._edited(changes[self.n_layers], h, positions)
                    self._blocks[self.n_layers - 1].output = (h, *output[1:]) if as_tuple else h
                if self.n_layers in wanted:
                    found[self.n_layers] = h
            if tokens is not None and self._head is not None:
                head = self._traced.get(self._head_path)
                head.skip(selected_head(self._head, head.input[:, -(reads or 0) :], tokens))
            output = nnsight.save(self._traced.output)
            found = nnsight.save(found)
        logits = output if isinstance(output, Tensor) else output.logits
        logits = logits[:, -(reads or 0) :].to(self.device)
        found = {index: h.to(self.device) for index, h in found.items()}
        if tokens is not None and self._head is None:
            logits = logits.gather(-1, repeat(tokens, "batch choice -> batch pos choice", pos=logits.shape[1]))
        return Run(logits[:, 0] if reads == 1 else logits, {site: found[site.index] for site in read})

    def prefill(
        self,
        prompts: Prompts,
        start: tuple[Site, Residual],
        *,
        edits: Mapping[Site, Edit] | None = None,
        n_pos: int = 1,
        tokens: Int[Tensor, "batch choice"] | None = None,
        reads: int | None = 1,
    ) -> tuple[Run, Suffix]:
        """Run whole prompts from a site on, and keep what later runs of their last positions need.

        Args:
            prompts: the whole prompts.
            start: a site and the residual `[batch pos d_model]` there, before any edit.
            edits: edits at the start site and above, applied here and in every later run of the suffix.
            n_pos: number of last positions in the suffix.
            tokens: as in `run`.
            reads: as in `run`.

        Returns:
            The result of the pass, with the edited residual at the start site, and the suffix.

        Raises:
            InputError: fewer than `n_pos` positions, or blocks that cannot be run without those below them.
        """
        site, pos = start[0], prompts.ids.shape[1]
        if not 1 <= n_pos <= int(prompts.mask.sum(-1).min()):
            raise InputError(f"positions: {n_pos} trailing positions asked, the shortest prompt is shorter")
        past = recorder(self.n_layers) if self.is_language_model and not self.recurrent else None
        keep = None if past is None else (past, None)
        try:
            with torch.no_grad():
                run = self.run(prompts, read=[site], edits=edits, start=start, past=keep, tokens=tokens, reads=reads)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            said = f"{type(error).__name__}: {' '.join(str(error).split())[-120:]}"
            raise InputError(
                f"model: {type(self.module).__name__} cannot be run from {site.hook_name} on ({said}); its blocks "
                "pass on more than one residual stream, or need what lower blocks give; use another model"
            ) from error
        above = {place: edit for place, edit in (edits or {}).items() if place.index > site.index}
        kept = None if past is None else KeysValues.of(past, pos - n_pos)
        return run, Suffix(self, prompts, site, run.residuals[site], n_pos, above, kept)

    def _places(self, parts: Mapping[Component, Change], first: int) -> dict[int, list[tuple[str, str, Change]]]:
        """List, for each block and in the order of a pass, the module path, kind and change of each component."""
        places: dict[int, list[tuple[str, str, Change]]] = {}
        for component, change in sorted(parts.items(), key=lambda one: one[0].order):
            if not first <= component.layer < self.n_layers:
                reach = f"give {first} to {self.n_layers - 1}"
                raise InputError(f"component: block {component.layer} is none of those that run; {reach}")
            path = f"{self.blocks_path}.{component.layer}"
            name = getattr(modules_of(self.module.get_submodule(path)), component.kind)
            places.setdefault(component.layer, []).append((f"{path}.{name}", component.kind, change))
        return places

    def _inputs(
        self, prompts: Prompts, real: Bool[Tensor, "batch all_pos"], positions: TokenIds, past: Any
    ) -> dict[str, Any]:
        """Keyword arguments of the module's forward."""
        if not self.is_language_model:
            if not bool(prompts.mask.all()):
                raise InputError(
                    f"prompts: of unequal length, and {type(self.module).__name__} takes no attention mask that would "
                    "hide the padding; give prompts of one length"
                )
            return {"input_ids": prompts.ids}
        inputs = {"input_ids": prompts.ids, "attention_mask": real.long(), "position_ids": positions.clamp(min=0)}
        return inputs | ({"use_cache": False} if past is None else {"use_cache": True, "past_key_values": past})

    def _changed(self, change: Change, h: Tensor) -> Tensor:
        """Apply a change on this model's device; `h` may be on another device of a model that is split over several."""
        return change(h.to(self.device)).to(h.device)

    def _edited(self, edit: Edit, h: Tensor, positions: TokenIds) -> Tensor:
        """Apply an edit on this model's device, as `_changed` does for a change."""
        return edit(h.to(self.device), positions).to(h.device)

    def _entering(self, index: int, residual: Residual) -> Residual:
        """Move a residual to the device of the block `index`, unless accelerate does so."""
        weight = next(self.module.get_submodule(f"{self.blocks_path}.{index}").parameters(), None)
        return residual if weight is None or weight.is_meta else residual.to(weight.device)

    @property
    def returns_tuples(self) -> bool:
        """Whether blocks return tuples, as in older transformers; tested once on one token."""
        if self._block_returns_tuple is None:
            with torch.no_grad(), self._traced.trace(input_ids=torch.zeros(1, 1, dtype=torch.long, device=self.device)):
                output = nnsight.save(self._blocks[0].output)
            self._block_returns_tuple = isinstance(output, tuple)
        return self._block_returns_tuple


@dataclass(frozen=True, eq=False)
class Suffix:
    """The last `n_pos` positions of a batch of prompts, from a site to the logits, with all earlier positions fixed."""

    model: Model
    prompts: Prompts
    site: Site
    state: Residual
    n_pos: int
    edits: Mapping[Site, Edit]
    past: KeysValues | None

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def residual(self) -> Residual:
        """The residual `[batch n_pos d_model]` at the site, at the positions that a perturbation reaches."""
        return self.state[:, -self.n_pos :]

    def select(self, rows: Rows) -> Suffix:
        """Select a subset of examples."""
        prompts = Prompts(self.prompts.ids[rows], self.prompts.mask[rows])
        past = None if self.past is None else self.past.select(rows)
        return Suffix(self.model, prompts, self.site, self.state[rows], self.n_pos, self.edits, past)

    def logits(
        self,
        residual: Residual,
        tokens: Int[Tensor, "batch choice"] | None = None,
        reads: int = 1,
        changes: Mapping[Site, Change] | None = None,
        parts: Mapping[Component, Change] | None = None,
    ) -> Float[Tensor, "batch ..."]:
        """Logits at the last `reads` positions with `residual [batch n_pos d_model]` at the site; differentiable in it.

        Args:
            residual: the state `[batch n_pos d_model]` at the site, after the edit there.
            tokens: as in `Model.run`.
            reads: as in `Model.run`.
            changes: further changes of the last `n_pos` positions at sites above, after the edits there.
            parts: changes of the outputs of components above, `[batch n_pos width]`.
        """
        edits = dict(self.edits)
        for site, change in (changes or {}).items():
            place = next((known for known in edits if known.index == site.index), site)
            edits[place] = self._then(edits.get(place), change)
        return self._run(residual, edits, tokens, reads, parts)

    def entering(self, residual: Residual, sites: Sequence[Site]) -> dict[Site, Residual]:
        """Residuals `[batch n_pos d_model]` at `sites` above, after all edits below and *before* the edit there.

        `residual` as in `logits`; differentiable in it.
        """
        seen: dict[Site, Tensor] = {}

        def watched(site: Site, change: Edit | None) -> Edit:
            def edit(h: Tensor, positions: Tensor) -> Tensor:
                seen[site] = h[:, -self.n_pos :]
                return h if change is None else change(h, positions)

            return edit

        changes = {site.index: (site, edit) for site, edit in self.edits.items()}
        for site in sites:
            changes[site.index] = (site, watched(site, changes[site.index][1] if site.index in changes else None))
        self._run(residual, dict(changes.values()), None)
        return seen

    def _then(self, first: Edit | None, change: Change) -> Edit:
        """Compose an edit with a change of the last `n_pos` positions."""

        def edit(h: Tensor, positions: Tensor) -> Tensor:
            h = h if first is None else first(h, positions)
            return torch.cat([h[:, : -self.n_pos], change(h[:, -self.n_pos :]).to(h.dtype)], dim=1)

        return edit

    def _run(
        self,
        residual: Residual,
        edits: Mapping[Site, Edit],
        tokens: Int[Tensor, "batch choice"] | None,
        reads: int = 1,
        parts: Mapping[Component, Change] | None = None,
    ) -> Float[Tensor, "batch ..."]:
        """Run the suffix once and return its logits."""
        ids, mask, n_pos = self.prompts.ids, self.prompts.mask, self.n_pos
        residual = residual.to(self.state.dtype)
        if self.past is None:
            prompts, past = self.prompts, None
            residual = torch.cat([self.state[:, :-n_pos], residual], dim=1)
            parts = {p: c if p.kind == "pattern" else self._at_suffix(c) for p, c in (parts or {}).items()}
        else:
            prompts = Prompts(ids[:, -n_pos:], mask[:, -n_pos:])
            past = stored(self.past, self.model.n_layers), mask[:, :-n_pos]
        start = self.site, residual
        return self.model.run(
            prompts, start=start, edits=edits, past=past, tokens=tokens, reads=reads, parts=parts
        ).logits

    def _at_suffix(self, change: Change) -> Change:
        """Restrict a change to the last `n_pos` positions."""
        return lambda h: torch.cat([h[:, : -self.n_pos], change(h[:, -self.n_pos :])], dim=1)


def positions_of(mask: Mask) -> TokenIds:
    """Position `[batch pos]` of each real token in its own prompt, counted from 0; -1 for padding."""
    return (mask.long().cumsum(-1) - 1).masked_fill(~mask, -1)


def selected_head(
    head: nn.Linear, hidden: Float[Tensor, "batch pos d_model"], tokens: Int[Tensor, "batch choice"]
) -> Float[Tensor, "batch pos choice"]:
    """Compute the head's logits for a few tokens per example, at a fraction of the cost of the vocabulary."""
    tokens = tokens.to(head.weight.device)
    weight = head.weight[tokens]
    logits = einsum(hidden, weight, "batch pos d_model, batch choice d_model -> batch pos choice")
    bias = cast("Tensor | None", head.bias)
    return logits if bias is None else logits + rearrange(bias[tokens], "batch choice -> batch 1 choice")


def is_recurrent(module: nn.Module) -> bool:
    """Whether some layer keeps a state other than keys and values, which no prefix can hold."""
    kinds = set(getattr(getattr(module, "config", None), "layer_types", None) or ())
    return bool(getattr(module, "_is_stateful", False)) or not kinds <= ATTENTION_LAYERS


def find_blocks(module: nn.Module) -> str:
    """Find the module path of the residual blocks: the longest `ModuleList` that is not inside another.

    Raises:
        InputError: there is none.
    """
    lists: dict[str, int] = {}
    for name, part in module.named_modules():  # parents come before their children
        if isinstance(part, nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer in lists):
            lists[name] = len(part)
    if not lists:
        raise InputError(f"model: {type(module).__name__} has no list of blocks; name it with `blocks='path.to.list'`")
    longest: str = max(lists, key=lambda name: lists[name])
    return longest
