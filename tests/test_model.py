"""The engine against plain PyTorch hooks on the same module, one unpadded prompt at a time."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import MambaConfig, MambaForCausalLM

from recover.models.host import Model, Prompts, find_blocks
from recover.types import InputError, Site
from tests.models import (
    D_MODEL,
    FAMILIES,
    N_LAYERS,
    VOCAB,
    WINDOW,
    left_padded,
    plain_forward,
    plain_lm,
    tiny_lm,
    token_rows,
)

SITES = {"first": Site(0), "middle": Site(2), "last": Site(N_LAYERS - 1, "post")}
TIGHT = {"atol": 3e-5, "rtol": 1e-4}


def bend(hidden: Tensor) -> Tensor:
    """An edit that works position by position, and is not linear."""
    return hidden + 0.5 * torch.tanh(hidden.roll(1, dims=-1))


def bend_rows(hidden: Tensor, positions: Tensor) -> Tensor:
    return torch.where((positions >= 0)[..., None], bend(hidden), hidden)


def random_delta(batch: int, n_pos: int, seed: int = 1) -> Tensor:
    return 3 * torch.randn(batch, n_pos, D_MODEL, generator=torch.Generator().manual_seed(seed))


def edited_by_hooks(module: nn.Module, ids: Tensor, site: Site, delta: Tensor, *, upper: Site | None) -> Tensor:
    """Last logits of one prompt with `bend` at the site (and above), then `delta` at its last positions."""

    def change(hidden: Tensor) -> Tensor:
        kept = len(hidden) - len(delta)
        return bend(hidden) + torch.cat([torch.zeros(kept, D_MODEL, dtype=hidden.dtype), delta.to(hidden.dtype)])

    changes = {site: change} | ({upper: bend} if upper is not None else {})
    return plain_forward(module, ids, changes)[0][-1]


def suffix_of(model: Model, prompts: Prompts, site: Site, n_pos: int, *, upper: Site | None, tokens=None):
    """What a search does: read the residual, prefill with the edits live, keep the suffix."""
    base = model.run(prompts, read=[site]).residuals[site]
    edits = {site: bend_rows} | ({upper: bend_rows} if upper is not None else {})
    return model.prefill(prompts, (site, base), edits=edits, n_pos=n_pos, tokens=tokens)


def upper_of(site: Site) -> Site | None:
    return Site(N_LAYERS - 1) if site.index < N_LAYERS - 1 else None


@pytest.mark.parametrize("family", FAMILIES)
def test_batched_prompts_of_unequal_length_run_as_each_alone(family: str) -> None:
    module, rows = tiny_lm(family), token_rows()
    sites = [Site(layer) for layer in range(N_LAYERS)] + [SITES["last"]]
    run = Model(module).run(left_padded(rows), read=sites, reads=None)
    for index, ids in enumerate(rows):
        logits, _ = plain_forward(module, ids)
        assert_close(run.logits[index, -len(ids) :], logits, **TIGHT)
        for site in sites:
            residual = plain_forward(module, ids, read=site)[1]
            assert_close(run.residuals[site][index, -len(ids) :], residual, **TIGHT)


@pytest.mark.parametrize("n_pos", [1, 3])
@pytest.mark.parametrize("site", SITES.values(), ids=SITES.keys())
@pytest.mark.parametrize("family", FAMILIES)
def test_suffix_runs_equal_hooked_full_passes_in_logits_and_gradient(family: str, site: Site, n_pos: int) -> None:
    module, rows = tiny_lm(family), token_rows()
    delta = random_delta(len(rows), n_pos)
    weights = torch.randn(len(rows), VOCAB, generator=torch.Generator().manual_seed(2))
    tokens = torch.tensor([[3, 5, 3], [0, 60, 7], [1, 2, 4], [9, 8, 50]])

    plain = delta.clone().requires_grad_(True)
    upper = upper_of(site)
    expected = torch.stack([edited_by_hooks(module, ids, site, plain[i], upper=upper) for i, ids in enumerate(rows)])
    (expected_gradient,) = torch.autograd.grad((weights * expected).sum(), plain)
    nothing = torch.zeros(n_pos, D_MODEL)
    undisturbed = torch.stack([edited_by_hooks(module, ids, site, nothing, upper=upper) for ids in rows])
    assert (expected - undisturbed).abs().mean() > 0.1  # the perturbation matters

    run, suffix = suffix_of(Model(module), left_padded(rows), site, n_pos, upper=upper)
    leaf = delta.clone().requires_grad_(True)
    logits = suffix.logits(suffix.residual + leaf)
    (gradient,) = torch.autograd.grad((weights * logits).sum(), leaf)
    assert_close(run.logits, undisturbed, **TIGHT)
    assert_close(suffix.logits(suffix.residual), undisturbed, **TIGHT)
    assert_close(logits, expected, **TIGHT)
    scale = expected_gradient.abs().max().item()
    assert_close(gradient, expected_gradient, atol=1e-4 * scale, rtol=1e-3)
    chosen = suffix.logits(suffix.residual + delta, tokens)
    assert_close(chosen, expected.detach().gather(1, tokens), **TIGHT)

    some = torch.tensor([2, 0])
    assert_close(suffix.select(some).logits((suffix.residual + delta)[some]), expected.detach()[some], **TIGHT)
    assert_close(
        suffix.select(some).select(torch.tensor([1])).logits((suffix.residual + delta)[:1]),
        expected.detach()[:1],
        **TIGHT,
    )


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gemma2", "gemma3"])
def test_bfloat16_suffix_is_as_near_to_float32_as_the_plain_bfloat16_model(family: str) -> None:
    lengths = tuple(range(4, 16))
    exact, rows, site = tiny_lm(family), token_rows(lengths), Site(2)
    # The same weights on both sides: rounding them is not the engine's doing.
    with torch.no_grad():
        for parameter in exact.parameters():
            parameter.copy_(parameter.bfloat16().float())
    rounded = tiny_lm(family).bfloat16()
    rounded.load_state_dict(exact.state_dict())
    delta = random_delta(len(rows), 1)
    truth = torch.stack([edited_by_hooks(exact, ids, site, delta[i], upper=None) for i, ids in enumerate(rows)])
    plain = torch.stack([edited_by_hooks(rounded, ids, site, delta[i], upper=None) for i, ids in enumerate(rows)])
    _, suffix = suffix_of(Model(rounded), left_padded(rows), site, 1, upper=None)
    ours = suffix.logits(suffix.residual + delta)
    assert ours.dtype == torch.bfloat16
    error, own = ((x.float() - truth).square().mean().sqrt() for x in (ours, plain))
    assert 0 < own < 0.5
    assert error < 1.5 * own


def test_the_window_is_shorter_than_the_prompts_and_cuts_them() -> None:
    module, ids = tiny_lm("mistral"), token_rows()[0]
    moved = ids.clone()
    moved[0] = moved[0] % (VOCAB - 1) + 1
    both = left_padded([ids, moved])
    seen, other = Model(module).run(both, read=[Site(1)]).residuals[Site(1)]
    assert_close(seen[WINDOW:], other[WINDOW:], atol=1e-6, rtol=0)
    assert not torch.allclose(seen[WINDOW - 1], other[WINDOW - 1], atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_starting_at_a_site_skips_what_is_below(family: str) -> None:
    module, rows, site = tiny_lm(family), token_rows(), Site(2)
    prompts, model = left_padded(rows), Model(module)
    residual = torch.stack(
        [
            torch.cat([torch.zeros(prompts.ids.shape[1] - len(ids), D_MODEL), plain_forward(module, ids, read=site)[1]])
            for ids in rows
        ]
    )
    other_ids = Prompts(torch.full_like(prompts.ids, 5), prompts.mask)  # the tokens no longer matter
    model.run(other_ids, start=(site, residual))  # the first time looks at what a block returns
    calls: list[int] = []
    handles = [
        block.self_attn.register_forward_hook(lambda *_, at=at: calls.append(at))
        for at, block in enumerate(getattr(getattr(module, "model", None), "layers", ()))
    ]
    logits = model.run(other_ids, start=(site, residual)).logits
    for handle in handles:
        handle.remove()
    assert_close(logits, torch.stack([plain_forward(module, ids)[0][-1] for ids in rows]), **TIGHT)
    if handles:
        assert calls == [2, 3]


def test_tokens_of_the_head_with_bias_and_softcap_and_without_a_head() -> None:
    rows, tokens = token_rows(), torch.tensor([[3, 5], [0, 60], [1, 1], [9, 8]])
    for module in (tiny_lm("gemma2"), tiny_lm("gpt2"), plain_lm()):
        batch = rows if module.config.__class__ is not SimpleNamespace else [row[:4] for row in rows]
        expected = torch.stack([plain_forward(module, ids)[0][-1] for ids in batch]).gather(1, tokens)
        assert_close(Model(module).run(left_padded(batch), tokens=tokens).logits, expected, **TIGHT)
    biased = tiny_lm()
    biased.lm_head.bias = nn.Parameter(torch.linspace(-3, 3, VOCAB), requires_grad=False)
    expected = torch.stack([plain_forward(biased, ids)[0][-1] for ids in rows]).gather(1, tokens)
    assert_close(Model(biased).run(left_padded(rows), tokens=tokens).logits, expected, **TIGHT)


def test_several_edits_act_together_and_reads_come_after_them() -> None:
    module, rows = tiny_lm(), token_rows()
    sites = (Site(1), Site(3), SITES["last"])
    run = Model(module).run(left_padded(rows), edits=dict.fromkeys(sites, bend_rows), read=sites)
    for index, ids in enumerate(rows):
        for site in sites:
            logits, residual = plain_forward(module, ids, dict.fromkeys(sites, bend), read=site)
            assert_close(run.logits[index], logits[-1], **TIGHT)
            assert_close(run.residuals[site][index, -len(ids) :], residual, **TIGHT)


def test_the_suffix_reuses_its_prefix_without_changing_it() -> None:
    module, rows, site = tiny_lm("gemma3"), token_rows(), Site(1)
    _, suffix = suffix_of(Model(module), left_padded(rows), site, 1, upper=None)
    delta = random_delta(len(rows), 1)
    first = suffix.logits(suffix.residual + delta)
    suffix.logits(suffix.residual - delta)
    assert torch.equal(suffix.logits(suffix.residual + delta), first)


def test_upper_blocks_see_only_the_suffix() -> None:
    """The cost of a step: `n_pos` positions an example through the blocks above the site, none below."""
    module, rows, site, seen = tiny_lm(), token_rows(), Site(2), []
    _, suffix = suffix_of(Model(module), left_padded(rows), site, 2, upper=None)
    for layer, block in enumerate(module.model.layers):
        block.mlp.register_forward_hook(lambda _, args, __, at=layer: seen.append((at, tuple(args[0].shape))))
    suffix.logits(suffix.residual)
    assert seen == [(2, (4, 2, D_MODEL)), (3, (4, 2, D_MODEL))]


@pytest.mark.parametrize("site", [Site(0), Site(2), Site(2, "post")])
def test_a_plain_module_that_is_not_of_transformers(site: Site) -> None:
    module, rows = plain_lm(), token_rows((6, 6, 6))
    model = Model(module)
    assert (model.blocks_path, model.n_layers, model.d_model) == ("stack", 3, D_MODEL)
    delta = random_delta(3, 2)
    plain, leaf = (delta.clone().requires_grad_(True) for _ in range(2))
    expected = torch.stack([edited_by_hooks(module, ids, site, plain[i], upper=None) for i, ids in enumerate(rows)])
    _, suffix = suffix_of(model, left_padded(rows), site, 2, upper=None)
    logits = suffix.logits(suffix.residual + leaf)
    assert_close(logits, expected, **TIGHT)
    for tensor, values in ((leaf, logits), (plain, expected)):
        values.square().sum().backward()
        assert tensor.grad is not None
    assert_close(leaf.grad, plain.grad, **TIGHT)
    tokens = torch.tensor([[1, 2]] * 3)
    rows_0 = torch.tensor([2])
    chosen = suffix.select(rows_0).logits((suffix.residual + delta)[rows_0], tokens[rows_0])
    assert_close(chosen, expected.detach()[2:, 1:3], **TIGHT)


def test_padding_that_a_plain_module_would_see_is_refused() -> None:
    with pytest.raises(InputError, match="unequal length"):
        Model(plain_lm()).run(left_padded(token_rows((6, 5))))


def test_weights_and_training_mode_are_left_alone() -> None:
    module, rows = tiny_lm(), token_rows()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    _, suffix = suffix_of(Model(module), left_padded(rows), Site(1), 1, upper=None)
    leaf = random_delta(4, 1).requires_grad_(True)
    suffix.logits(suffix.residual + leaf).sum().backward()
    assert not module.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert all(parameter.grad is None for parameter in module.parameters())
    assert_close(module(rows[0][None]).logits[0], plain_forward(module, rows[0])[0], atol=0, rtol=0)


class Words:
    """A tokenizer of one letter a token, with a beginning-of-sequence token."""

    def __call__(self, text: str) -> dict[str, Any]:
        return {"input_ids": [1, *(ord(letter) - 95 for letter in text)] if text else []}


def test_tokenize_pads_on_the_left_and_keeps_the_bos() -> None:
    prompts = Model(plain_lm(), Words()).tokenize(["abc", "a"])
    assert prompts.ids.tolist() == [[1, 2, 3, 4], [0, 0, 1, 2]]
    assert prompts.mask.tolist() == [[True] * 4, [False, False, True, True]]
    assert prompts.positions.tolist() == [[0, 1, 2, 3], [-1, -1, 0, 1]]
    alone = prompts.select(torch.tensor([1]))
    assert alone.ids.tolist() == [[1, 2]]
    assert alone.mask.all()
    assert prompts.select(torch.tensor([1, 0])).ids.tolist() == [[0, 0, 1, 2], [1, 2, 3, 4]]


def test_an_empty_prompt_and_a_missing_tokenizer_are_named() -> None:
    with pytest.raises(InputError, match="empty"):
        Model(plain_lm(), Words()).tokenize(["abc", ""])
    with pytest.raises(InputError, match="no prompt"):
        Model(plain_lm(), Words()).tokenize([])
    with pytest.raises(InputError, match="without a tokenizer"):
        Model(plain_lm()).tokenize(["abc"])


def test_a_module_without_blocks_is_refused_unless_named() -> None:
    with pytest.raises(InputError, match="no list of blocks"):
        Model(nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5)))


def test_the_stack_of_blocks_is_not_taken_for_a_list_inside_a_block() -> None:
    block = nn.Module()
    block.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(8))
    module = nn.Module()
    module.body = nn.Module()
    module.body.blocks = nn.ModuleList([block, block])
    assert find_blocks(module) == "body.blocks"


@pytest.mark.parametrize("site", [Site(N_LAYERS), Site(-1), Site(N_LAYERS, "post")])
def test_a_site_out_of_range_is_named(site: Site) -> None:
    model, prompts = Model(tiny_lm()), left_padded(token_rows())
    with pytest.raises(InputError, match=f"{N_LAYERS} blocks; layer must be 0 to {N_LAYERS - 1}"):
        model.run(prompts, read=[site])
    with pytest.raises(InputError, match="layer must be"):
        model.run(prompts, edits={site: bend_rows})


def test_more_positions_than_the_shortest_prompt_has_are_refused() -> None:
    model, prompts = Model(tiny_lm()), left_padded(token_rows())
    residual = model.run(prompts, read=[Site(1)]).residuals[Site(1)]
    for n_pos in (0, 5):
        with pytest.raises(InputError, match="trailing positions"):
            model.prefill(prompts, (Site(1), residual), n_pos=n_pos)


def test_a_width_that_the_configuration_does_not_tell_is_named() -> None:
    module = plain_lm()
    del module.config
    with pytest.raises(InputError, match="hidden_size"):
        _ = Model(module).d_model


def test_batch_size_falls_with_memory_and_with_length(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(tiny_lm())
    short, long = left_padded(token_rows((4, 4))), left_padded(token_rows((40, 40)))
    monkeypatch.setattr("recover.models.capacity.free_memory", lambda _: 10**12)
    assert model.batch_size(long) == 64
    monkeypatch.setattr("recover.models.capacity.free_memory", lambda _: 10**6)
    assert 1 <= model.batch_size(long) < model.batch_size(short) <= 64
    monkeypatch.setattr("recover.models.capacity.free_memory", lambda _: 10)
    assert model.batch_size(long) == 1


def test_a_recurrent_model_runs_one_whole_prompt_at_a_time() -> None:
    """A state that is not keys and values cannot be held as a prefix, and would take in padding."""
    torch.manual_seed(0)
    module = MambaForCausalLM(MambaConfig(vocab_size=50, hidden_size=16, state_size=4, num_hidden_layers=3)).eval()
    model, site = Model(module), Site(1)
    prompts = left_padded([torch.tensor([3, 4, 5, 6, 7, 8])])
    assert model.batch_size(left_padded(token_rows((4, 4)))) == 1
    delta = torch.randn(1, 2, 16)
    _, suffix = model.prefill(prompts, (site, model.run(prompts, read=[site]).residuals[site]), n_pos=2)
    block = module.backbone.layers[site.index]

    def add(_: nn.Module, arguments: tuple) -> tuple:
        h = arguments[0].clone()
        h[:, -2:] += delta
        return (h, *arguments[1:])

    handle = block.register_forward_pre_hook(add)
    expected = module(prompts.ids).logits[:, -1]
    handle.remove()
    assert_close(suffix.logits(suffix.residual + delta), expected, rtol=1e-4, atol=1e-5)
