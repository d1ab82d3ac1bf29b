"""Components read and patched against PyTorch's own hooks, what adds up, and a head whose effect is known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.testing import assert_close

from recover.defenses.clamps import Clamp, Defense, Scale, Set
from recover.defenses.defended import Defended, defend
from recover.evidence.attribution.movers import looks, undefended, writes
from recover.evidence.attribution.parts import entering
from recover.evidence.attribution.paths import Carrier, carriers, direct, patched, through, trace
from recover.models.components import Component, eager, head_count, modules_of, projection
from recover.models.host import Model, Prompts
from recover.saes.activations import ReLU
from recover.saes.sae import SAE
from recover.tasks.behaviors import LogitDifference
from recover.types import InputError, Site, Surface
from tests.by_hand import defense_of, sae_lens_sae
from tests.models import D_MODEL, FAMILIES, N_LAYERS, blocks_of, left_padded, plain_lm, tiny_lm, token_rows

BY_FAMILY = pytest.mark.parametrize("family", FAMILIES)
CLOSE = {"atol": 2e-4, "rtol": 1e-4}
BEHAVIOR = LogitDifference(torch.tensor([3, 9, 27, 40]), torch.tensor([5, 1, 30, 2]))
HEADS = 4
MLP_OUTPUT = {"gemma2": "post_feedforward_layernorm", "gemma3": "post_feedforward_layernorm"}
PROJECTION = {"gpt2": "attn.c_proj", "gpt_neox": "attention.dense"}


def tiny_defended(
    family: str, *, n_pos: int = 2, every_site: bool = False, layers: tuple[int, ...] = (1, 2), module: Any = None
) -> Defended:
    """A tiny model of a family, clamped before its second and its third block."""
    edits = {Site(layer): [(sae_lens_sae("standard", layer), (2, 7, 11), Set(-2.0), True, "all")] for layer in layers}
    prompts, module = left_padded(token_rows()), module or tiny_lm(family, scale=5.0)
    return defend(
        Model(module),
        defense_of(edits),
        prompts,
        BEHAVIOR,
        n_pos=n_pos,
        surface=Surface("every" if every_site else "first"),
    )


def put_back(defended: Defended, delta: Tensor, chosen: Sequence[Carrier]) -> tuple[Tensor, Tensor]:
    """Run with the delta, and these components as in the defended run."""
    defended, delta = entering(defended, delta)
    return patched(defended, delta, trace(defended, torch.zeros_like(delta)), chosen)


def put_in(defended: Defended, delta: Tensor, chosen: Sequence[Carrier]) -> tuple[Tensor, Tensor]:
    """Run without the delta, and these components as in the recovered run."""
    defended, delta = entering(defended, delta)
    return patched(defended, torch.zeros_like(delta), trace(defended, delta), chosen)


def noise(defended: Defended, size: float = 0.5, seed: int = 0) -> Tensor:
    return size * torch.randn(defended.zero_delta.shape, generator=torch.Generator().manual_seed(seed))


def hooked(
    module: nn.Module, ids: Tensor, layer: int, path: str, change: Callable[[Tensor], Tensor], entering: bool
) -> Tensor:
    """Logits `[vocab]` of one prompt, with what enters or leaves a module of a block changed by a PyTorch hook."""
    place = blocks_of(module)[layer].get_submodule(path)
    if entering:
        handle = place.register_forward_pre_hook(lambda _, args: (change(args[0]), *args[1:]))
    else:
        handle = place.register_forward_hook(lambda _, args, output: change(output))
    try:
        logits: Tensor = module(input_ids=ids[None], use_cache=False).logits[0, -1]
        return logits
    finally:
        handle.remove()


@BY_FAMILY
@pytest.mark.parametrize("kind", ["heads", "mlp"])
def test_a_component_is_read_and_changed_as_hooks_on_the_module_do(family: str, kind: str) -> None:
    module, rows = tiny_lm(family), token_rows()
    path = PROJECTION.get(family, "self_attn.o_proj") if kind == "heads" else MLP_OUTPUT.get(family, "mlp")
    seen: list[Tensor] = []
    theirs_seen: list[Tensor] = []

    def change(h: Tensor, kept: list[Tensor]) -> Tensor:
        kept.append(h)
        return torch.cat([h[..., :4] * 1.5 - 1, h[..., 4:]], dim=-1)

    place = Component(2, kind)  # type: ignore[arg-type]
    ours = Model(module).run(left_padded(rows), parts={place: lambda h: change(h, seen)}).logits
    theirs = torch.stack(
        [hooked(module, ids, 2, path, lambda h: change(h, theirs_seen), kind == "heads") for ids in rows]
    )
    assert_close(ours, theirs, **CLOSE)
    for row, ids in enumerate(rows):
        assert_close(seen[0][row, -len(ids) :], theirs_seen[row][0], **CLOSE)


@BY_FAMILY
def test_a_block_adds_what_its_components_add(family: str) -> None:
    seen: dict[str, Tensor] = {}

    def keep(kind: str) -> Callable[[Tensor], Tensor]:
        return lambda h: seen.setdefault(kind, h)

    prompts = left_padded(token_rows())
    parts = {Component(1, kind): keep(kind) for kind in ("attention", "mlp")}  # type: ignore[arg-type]
    run = Model(tiny_lm(family)).run(prompts, read=[Site(1), Site(2)], parts=parts)
    moved = run.residuals[Site(2)] - run.residuals[Site(1)]
    assert_close((seen["attention"] + seen["mlp"])[prompts.mask], moved[prompts.mask], **CLOSE)


@pytest.mark.parametrize("family", ["bloom", "granite"])
def test_components_that_do_not_add_up_are_refused(family: str) -> None:
    """Bloom adds the residual within the MLP, Granite scales what its parts give."""
    with pytest.raises(InputError, match=r"components: .* cannot be told apart; see `recover verify`"):
        trace(defended := tiny_defended(family, layers=(1,)), noise(defended))


@BY_FAMILY
def test_a_suffix_gives_the_components_of_the_whole_run(family: str) -> None:
    defended = tiny_defended(family)
    run = trace(defended, torch.zeros_like(noise(defended)))
    seen: dict[Component, Tensor] = {}
    whole = defended.suffix.state
    keep = {place: (lambda h, place=place: seen.setdefault(place, h)) for place in run.given}
    defended.suffix.model.run(defended.suffix.prompts, start=(Site(1), whole), edits=defended.suffix.edits, parts=keep)
    assert {place.layer for place in run.given} == {1, 2, 3}
    for place, given in run.given.items():
        assert_close(given, seen[place][:, -2:], **CLOSE)


@BY_FAMILY
@pytest.mark.parametrize("every_site", [False, True])
def test_direct_effects_add_up_to_the_effect_in_any_model(family: str, every_site: bool) -> None:
    defended = tiny_defended(family, every_site=every_site)
    delta = noise(defended)
    found = direct(defended, delta, 12)
    effect = defended(delta)[0] - defended(torch.zeros_like(delta))[0]
    assert_close(found.effect, effect, atol=1e-5, rtol=1e-4)
    assert_close(torch.stack(list(found.by_name.values())).sum(dim=0), effect, atol=1e-4, rtol=1e-3)
    assert list(found.by_name)[:3] == ["delta", "L1 attention", "L1 MLP"]


@BY_FAMILY
def test_with_all_components_put_back_only_the_delta_itself_is_left(family: str) -> None:
    """And with all of them put in, all but it."""
    defended = tiny_defended(family, layers=(1,))
    delta = noise(defended)
    on, off = trace(defended, delta), trace(defended, torch.zeros_like(delta))
    last, reads = Site(N_LAYERS - 1, "post"), defended.behavior

    def scored(final: Tensor) -> Tensor:
        logits = defended.logits(torch.zeros_like(delta), changes={last: lambda h: final})
        return reads.score(logits)

    assert_close(put_back(defended, delta, carriers(defended))[0], scored(off.final + delta), **CLOSE)
    assert_close(put_in(defended, delta, carriers(defended))[0], scored(on.final - delta), **CLOSE)


@BY_FAMILY
def test_patching_one_head_is_what_a_hook_on_the_module_does(family: str) -> None:
    """The whole prompt by hand: the head's slice of what enters the output projection, at the last two positions."""
    plain = tiny_defended(family, layers=(1,))
    delta = noise(plain)
    values = trace(plain, delta)
    chosen, head = Carrier(2, 1), slice(D_MODEL // HEADS, 2 * D_MODEL // HEADS)
    score, _ = patched(plain, torch.zeros_like(delta), values, [chosen])
    path = PROJECTION.get(family, "self_attn.o_proj")
    module: Any = plain.suffix.model.module
    for row, ids in enumerate(token_rows()):
        state = plain.suffix.state[row : row + 1, -len(ids) :]

        def put(z: Tensor, row: int = row) -> Tensor:
            z = z.clone()
            z[0, -2:, head] = values.given[Component(2, "heads")][row, :, head]
            return z

        # The defended state at the second block, put there by a hook of its own.
        start = blocks_of(module)[1].register_forward_pre_hook(
            lambda _, args, kwargs, state=state: (
                ((state, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": state})
            ),
            with_kwargs=True,
        )
        try:
            logits = hooked(module, ids, 2, path, put, entering=True)
        finally:
            start.remove()
        assert_close(score[row], logits[BEHAVIOR.target[row]] - logits[BEHAVIOR.other[row]], **CLOSE)


class Mixing(nn.Module):
    """Attention of a toy: each head gives a linear function of the mean of all positions up to its own."""

    def __init__(self, read: Tensor, write: Tensor) -> None:
        super().__init__()
        self.read, self.o_proj = nn.Parameter(read), nn.Linear(*write.shape, bias=False)
        self.o_proj.weight = nn.Parameter(write.T.contiguous())

    def forward(self, h: Tensor) -> Tensor:
        count = torch.arange(1, h.shape[1] + 1, dtype=h.dtype)
        mixed: Tensor = self.o_proj(h.cumsum(dim=1) / count[:, None] @ self.read)
        return mixed


class LinearBlock(nn.Module):
    """A block whose attention and MLP are linear."""

    def __init__(self, read: Tensor, write: Tensor, think: Tensor) -> None:
        super().__init__()
        self.self_attn, self.mlp = Mixing(read, write), nn.Linear(*think.shape, bias=False)
        self.mlp.weight = nn.Parameter(think)

    def forward(self, h: Tensor) -> Tensor:
        h = h + self.self_attn(h)
        moved: Tensor = h + self.mlp(h)
        return moved


class Toy(nn.Module):
    """Blocks between an embedding and a head; all of it linear."""

    def __init__(self, blocks: list[LinearBlock], embedding: Tensor, head: Tensor) -> None:
        super().__init__()
        self.config = SimpleNamespace(hidden_size=embedding.shape[1], num_attention_heads=2)
        self.embedding = nn.Embedding(*embedding.shape, _weight=embedding)
        self.blocks, self.head = nn.ModuleList(blocks), nn.Linear(*head.T.shape, bias=False)
        self.head.weight = nn.Parameter(head)

    def forward(self, input_ids: Tensor) -> Tensor:
        h = self.embedding(input_ids)
        for block in self.blocks:
            h = block(h)
        logits: Tensor = self.head(h)
        return logits


WIDTH, TOKENS = 6, 9
TOY_BEHAVIOR = LogitDifference(torch.tensor([0, 1, 2]), torch.tensor([3, 4, 5]))


def toy(planted: bool = False) -> tuple[Toy, Defended]:
    """Three linear blocks, clamped before the second; planted, all they do is that head 1 of the last moves 0 to 1."""
    generator = torch.Generator().manual_seed(5)

    def drawn(*shape: int) -> Tensor:
        return 0.4 * torch.randn(*shape, generator=generator)

    blocks = [LinearBlock(drawn(WIDTH, 4), drawn(4, WIDTH), drawn(WIDTH, WIDTH)) for _ in range(3)]
    head = drawn(TOKENS, WIDTH)
    if planted:
        for block in blocks:
            for parameter in block.parameters():
                nn.init.zeros_(parameter)
        # Head 1 has the places 2 and 3 of 4: it reads dimension 0 and writes dimension 1, which the logits read.
        blocks[2].self_attn.read.data[0, 2], blocks[2].self_attn.o_proj.weight.data[1, 2] = 1.0, 1.0
        head = torch.zeros(TOKENS, WIDTH)
        head[:3, 1], head[3:6, 1] = 1.0, -1.0
    module = Toy(blocks, drawn(TOKENS, WIDTH), head).eval().requires_grad_(False)
    sae = SAE(
        drawn(WIDTH, 8), torch.full((8,), 20.0), drawn(8, WIDTH), torch.zeros(WIDTH), ReLU(), Site(1), "standard", "0"
    )
    ids = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 0]])
    defense = Defense((Clamp(sae, (0, 1), Scale(1.5)),))
    prompts = Prompts(ids, torch.ones_like(ids, dtype=torch.bool))
    return module, defend(Model(module), defense, prompts, TOY_BEHAVIOR, n_pos=2)


def test_in_a_linear_toy_all_is_exact() -> None:
    """Through: what putting a component in does, and what putting it back takes; direct: adds up, whatever the path."""
    _, defended = toy()
    delta = noise(defended, 3.0)
    start, end = defended(torch.zeros_like(delta))[0], defended(delta)[0]
    plain, along = through(defended, delta, 0), through(defended, delta, 3)
    assert list(plain) == [Carrier(layer, head) for layer in (1, 2) for head in (0, 1, None)]
    for carrier, effect in plain.items():
        assert_close(along[carrier], effect, atol=1e-5, rtol=1e-4)
        assert_close(put_in(defended, delta, [carrier])[0] - start, effect, atol=1e-5, rtol=1e-4)
        assert_close(end - put_back(defended, delta, [carrier])[0], effect, atol=1e-5, rtol=1e-4)
    found = direct(defended, delta, 1)
    assert_close(torch.stack(list(found.by_name.values())).sum(dim=0), end - start, atol=1e-5, rtol=1e-4)
    assert float(found.by_name["rest"].abs().max()) < 1e-5
    # By hand: what the last block's MLP adds, through the head alone.
    on, off = (trace(defended, one).given[Component(2, "mlp")][:, -1] for one in (delta, 0 * delta))
    weight = defended.suffix.model.module.get_submodule("head").weight
    across = weight[TOY_BEHAVIOR.target] - weight[TOY_BEHAVIOR.other]  # type: ignore[index]
    assert_close(found.by_name["L2 MLP"], ((on - off) * across).sum(dim=1), atol=1e-5, rtol=1e-4)


def test_a_planted_head_carries_all_of_it() -> None:
    """A delta along dimension 0 at the last two of three positions reaches the logits through head 1 alone."""
    _, defended = toy(planted=True)
    delta = torch.zeros_like(defended.zero_delta)
    delta[..., 0] = 1.5
    start, end = defended(torch.zeros_like(delta))[0], defended(delta)[0]
    # The mean over three positions, two of them raised by 1.5; written once for the target, once against the other.
    assert_close(end - start, torch.full((3,), 2 * 1.5 * 2 / 3))
    effects = through(defended, delta)
    for carrier, effect in effects.items():
        assert_close(effect, end - start if carrier == Carrier(2, 1) else torch.zeros(3), atol=1e-6, rtol=1e-5)
    others = [carrier for carrier in carriers(defended) if carrier != Carrier(2, 1)]
    assert_close(put_back(defended, delta, [Carrier(2, 1)])[0], start)
    assert_close(put_in(defended, delta, [Carrier(2, 1)])[0], end)
    assert_close(put_back(defended, delta, others)[0], end)
    assert_close(put_in(defended, delta, others)[0], start)
    found = direct(defended, delta)
    assert_close(found.by_name["L2 attention"], end - start)
    assert_close(writes(defended, delta)[Carrier(2, 1)] - writes(defended, 0 * delta)[Carrier(2, 1)], end - start)


def test_what_enters_before_the_clamp_is_traced_as_what_it_changes_after_it() -> None:
    _, defended = toy()
    before = Defended(**{**vars(defended), "surface": Surface(placement="before_clamp")})
    delta = noise(defended)
    found = direct(before, delta)
    assert_close(found.effect, before(delta)[0] - before(torch.zeros_like(delta))[0], atol=1e-5, rtol=1e-4)
    assert float((found.effect - direct(defended, delta).effect).abs().max()) > 1e-3


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gemma2"])
def test_where_heads_look_is_what_the_module_says(family: str) -> None:
    defended, rows = tiny_defended(family), token_rows()
    off = undefended(defended)
    marked = defended.suffix.prompts.ids == torch.tensor([[int(row[1])] for row in rows])
    found = looks(off, torch.zeros_like(noise(off)), marked)
    module: Any = off.suffix.model.module
    before = module.config._attn_implementation
    with eager(module):
        for row, ids in enumerate(rows):
            patterns = module(input_ids=ids[None], use_cache=False, output_attentions=True).attentions
            for (layer, head), one in {(c.layer, c.head): v for c, v in found.items()}.items():
                there = patterns[layer][0, head, -1, ids == ids[1]].sum()
                assert_close(one[row], there, atol=1e-4, rtol=1e-3)
    assert module.config._attn_implementation == before
    assert {carrier.layer for carrier in found} == {1, 2, 3}


def test_heads_write_what_taking_them_away_takes_in_the_last_block() -> None:
    """Llama with a linear head and no last norm: the last block's heads write to the logits and no MLP reads them."""
    module = tiny_lm()
    module.model.norm, module.model.layers[3].mlp = nn.Identity(), Nothing()
    defended = undefended(tiny_defended("llama", n_pos=1, module=module))
    zero = defended.zero_delta
    run = trace(defended, zero)
    cut = {place: torch.zeros_like(given) for place, given in run.given.items()}
    nothing = type(run)(run.score, run.slack, cut, run.final)
    for head in range(HEADS):
        taken = run.score - patched(defended, zero, nothing, [Carrier(3, head)])[0]
        assert_close(writes(defended, zero)[Carrier(3, head)], taken, **CLOSE)


class Nothing(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return torch.zeros_like(h)


@BY_FAMILY
def test_the_output_projection_is_cut_into_heads(family: str) -> None:
    module = tiny_lm(family)
    block = blocks_of(module)[1]
    place = block.get_submodule(modules_of(block).heads)
    z = torch.randn(2, D_MODEL, generator=torch.Generator().manual_seed(0))
    by_head = torch.einsum(
        "bhd,hdm->bm", rearrange(z, "b (h d) -> b h d", h=HEADS), projection(block, head_count(module))
    )
    assert_close(by_head, place(z) - place(torch.zeros_like(z)), atol=1e-5, rtol=1e-4)


def test_what_cannot_be_traced_is_refused_in_one_line() -> None:
    prompts = left_padded([torch.tensor([1, 2, 3])])
    with pytest.raises(InputError, match="PlainBlock has no attention and MLP by the names"):
        Model(plain_lm()).run(prompts, parts={Component(0, "mlp"): lambda h: h})
    model = Model(tiny_lm())
    with pytest.raises(InputError, match="block 4 is none of those that run; give 0 to 3"):
        model.run(prompts, parts={Component(4, "mlp"): lambda h: h})
    with pytest.raises(InputError, match="block 0 is none of those that run; give 1 to 3"):
        model.run(prompts, start=(Site(1), torch.zeros(1, 3, D_MODEL)), parts={Component(0, "mlp"): lambda h: h})
    with pytest.raises(InputError, match="of transformers only"), eager(plain_lm()):
        pass
    with pytest.raises(InputError, match="no `num_attention_heads`"):
        head_count(plain_lm())
    edits = {Site(3, "post"): [(sae_lens_sae("standard"), (2, 7), Set(-2.0), True, "all")]}
    top = defend(model, defense_of(edits), left_padded(token_rows()), BEHAVIOR)
    with pytest.raises(InputError, match="no block is above the clamped site"):
        through(top, top.zero_delta)
    with pytest.raises(InputError, match="norm what attention gives"):
        writes(tiny_defended("gemma3"), noise(tiny_defended("gemma3")))
