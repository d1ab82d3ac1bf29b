"""The laws on models and SAEs that keep them, of every family; and each law on a model or an SAE that breaks it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from recover.checks import laws as laws_module
from recover.checks import verify as laws_of
from recover.checks.verification import Law, Support, fitting, stand_in, supported, verify
from recover.cli import main
from recover.evidence.transfer import Pool
from recover.models import names
from recover.models.host import Model, Suffix
from recover.saes.activations import ReLU
from recover.saes.sae import SAE
from recover.search.constraints.linear import EncoderOrthogonal
from recover.types import InputError, Site
from tests.models import D_MODEL, FAMILIES, OTHERS, VOCAB, left_padded, plain_lm, tiny_lm, token_rows
from tests.saes import random_sae

ROWS = token_rows([7, 5, 6], seed=3)
UNLIKE = {"bloom", "mpt", "granite", "falcon", "opt"}
"""Families whose attention and MLP have other names, or do not add up to what a block adds."""

SITE = Site(2)


def sae(d_model: int = D_MODEL, site: Site | None = SITE) -> SAE:
    """An orthonormal basis and its negative, and biases."""
    generator = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(d_model, d_model, generator=generator)).Q
    W = torch.cat([Q, -Q], dim=1)
    biases = 0.1 * torch.randn(2 * d_model, generator=generator)
    return SAE(W, biases, W.T.contiguous(), torch.zeros(d_model), ReLU(), site, "standard", "0" * 64)


def told(laws: list[Law]) -> dict[str, bool | None]:
    return {law.name: law.holds for law in laws}


def runs(model: Model, laws: list[Law]) -> dict[str, bool]:
    return {one.protocol: one.runs for one in supported(model, laws)}


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_all_laws_hold_for_every_family(family: str) -> None:
    model = Model(tiny_lm(family, scale=4.0))
    found = verify(model, sae(), left_padded(ROWS))
    if family in UNLIKE:
        assert found.pop().holds is None
    assert [law for law in found if law.holds is not True] == []
    assert len(found) == 12 - (family in UNLIKE)


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_what_can_be_run_follows(family: str) -> None:
    model = Model(tiny_lm(family, scale=4.0))
    found = runs(model, verify(model, sae(), left_padded(ROWS)))
    assert not found.pop("task refusal")  # it has no tokenizer, and so no chat template
    assert found.pop("heads and MLPs") == (family == "llama")
    assert set(found.values()) == {True}
    assert set(found) == {"search", "prompts in batches", "search with a cache", "transfer", "whole answers"}


def test_the_blocks_components_are_measured_and_not_only_named() -> None:
    found = {family: verify(Model(tiny_lm(family, scale=4.0)), sae(), left_padded(ROWS))[-1] for family in UNLIKE}
    assert "by the names that transformers gives them" in found["opt"].detail
    for family in UNLIKE - {"opt"}:
        assert "sum of attention and MLP against what the block adds" in found[family].detail


@pytest.mark.parametrize("offloaded", [(1, 3), (2,)])
def test_all_laws_hold_where_accelerate_keeps_blocks_elsewhere(offloaded: tuple[int, ...], tmp_path: Path) -> None:
    """Some blocks' weights lie on the disk until they are needed, the site's own among them."""
    module = tiny_lm(scale=4.0)
    places = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"), "cpu")
    places |= {f"model.layers.{index}": "disk" if index in offloaded else "cpu" for index in range(4)}
    spread = accelerate.dispatch_model(module, device_map=places, main_device="cpu", offload_dir=tmp_path)
    assert any(weight.is_meta for weight in spread.parameters())
    model = Model(spread)
    found = verify(model, sae(), left_padded(ROWS))
    assert [law for law in found if law.holds is not True] == []
    assert model.batch_size(left_padded(ROWS)) == Model(tiny_lm()).batch_size(left_padded(ROWS))


def test_a_model_in_half_precision_is_measured_where_that_says_something() -> None:
    found = told(verify(Model(tiny_lm(scale=4.0).bfloat16()), sae(), left_padded(ROWS)))
    assert found.pop("gradient") is None
    assert set(found.values()) == {True}


BREAKS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "suffix": lambda patch: patch.setattr(Suffix, "logits", lambda self, *_, **__: torch.zeros(3, 61)),
    "blindness": lambda patch: patch.setattr(EncoderOrthogonal, "project", lambda self, delta: delta),
    "shared": lambda patch: patch.setattr(Pool, "slack", lambda self, deltas: torch.zeros(1, len(self))),
    "generation": lambda patch: patch.setattr(
        laws_module, "generate", lambda model, prompts, n: torch.zeros(len(prompts), n, dtype=torch.long)
    ),
    "decomposition": lambda patch: patch.setattr(
        laws_module, "decompose", lambda sae, x: replace(REAL(sae, x), error=0 * x)
    ),
}
REAL = laws_module.decompose


@pytest.mark.parametrize("law", BREAKS)
def test_a_broken_law_is_noticed(law: str, monkeypatch: pytest.MonkeyPatch) -> None:
    BREAKS[law](monkeypatch)
    assert told(verify(Model(tiny_lm(scale=4.0)), sae(), left_padded(ROWS)))[law] is False


def test_a_model_whose_output_depends_on_padding_is_noticed() -> None:
    """It counts columns of the batch, and not the prompt's own positions."""
    module = tiny_lm(scale=4.0)
    module.model.embed_tokens.register_forward_hook(
        lambda _, __, output: output + 0.1 * torch.arange(output.shape[1])[None, :, None]
    )
    assert told(verify(Model(module), sae(), left_padded(ROWS)))["batching"] is False


def test_a_gradient_that_lies_is_noticed() -> None:
    class Flat(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *gradient: Tensor) -> Tensor:
            return 0.5 * gradient[0]

    module = tiny_lm(scale=4.0)
    module.model.norm.register_forward_hook(lambda _, __, output: Flat.apply(output))
    assert told(verify(Model(module), sae(), left_padded(ROWS)))["gradient"] is False


def test_what_cannot_be_verified_is_refused_in_one_line() -> None:
    model, prompts = Model(tiny_lm()), left_padded(ROWS)
    with pytest.raises(InputError, match="does not say where it reads"):
        verify(model, sae(site=None), prompts)
    with pytest.raises(InputError, match=r"the SAE reads a residual of width 12 and the model's is 16 wide"):
        verify(model, sae(12), prompts)
    with pytest.raises(InputError, match=r"blocks\.9"):
        verify(model, sae(site=Site(9)), prompts)
    assert laws_of is verify


@pytest.mark.filterwarnings("ignore:Module 'model")  # nnsight, of a submodule that is called `output`
@pytest.mark.parametrize("attention", [1.0, 0.03])
def test_an_encoder_that_sees_what_comes_later_is_noticed(attention: float) -> None:
    """However little of it reaches the earlier positions."""
    config = transformers.BertConfig(
        vocab_size=VOCAB, hidden_size=D_MODEL, num_hidden_layers=4, num_attention_heads=4, intermediate_size=24
    )
    module = transformers.BertLMHeadModel(config).eval()
    for block in module.bert.encoder.layer:
        block.attention.output.dense.weight.data *= attention
    model = Model(module)
    found = verify(model, sae(), left_padded(ROWS))
    assert told(found)["causal"] is False
    can = {one.protocol: one for one in supported(model, found)}
    assert can["search"] == Support("search", False, "broken: causal")
    assert not can["transfer"].runs


def test_prompts_beyond_a_models_context_are_refused_in_one_line() -> None:
    """GPT-2 has a vector for each of 64 positions."""
    model, long = Model(tiny_lm("gpt2")), left_padded(token_rows([70, 5], seed=3))
    said = r"^verify: GPT2LMHeadModel fails on prompts of 70 tokens \(index out of range .*its context is shorter"
    for look in (
        lambda: verify(model, sae(), long),
        lambda: stand_in(model, long, SITE),
        lambda: fitting(model, sae(), long, SITE),
    ):
        with pytest.raises(InputError, match=said):
            look()


def test_an_encoder_with_a_decoder_is_refused() -> None:
    config = transformers.T5Config(vocab_size=61, d_model=D_MODEL, d_kv=4, d_ff=16, num_layers=2, num_heads=2)
    with pytest.raises(InputError, match="T5ForConditionalGeneration has an encoder and a decoder"):
        Model(transformers.T5ForConditionalGeneration(config))


def mamba() -> transformers.MambaForCausalLM:
    options = {"hidden_size": D_MODEL, "state_size": 4, "num_hidden_layers": 4, "vocab_size": 61}
    return transformers.MambaForCausalLM(transformers.MambaConfig(**options)).eval()


def test_of_a_recurrent_model_it_says_what_cannot_be_run_and_why() -> None:
    model = Model(mamba())
    found = verify(model, sae(), left_padded(ROWS))
    holds = told(found)
    assert (holds.pop("batching"), holds.pop("components")) == (None, None)
    assert set(holds.values()) == {True}
    can = {one.protocol: one for one in supported(model, found)}
    assert [name for name, one in can.items() if one.runs] == ["search", "transfer", "whole answers"]
    assert "absorbs the padding of shorter prompts: they run one at a time" in can["prompts in batches"].reason
    assert "each step runs the whole prompt" in can["search with a cache"].reason
    assert "each token runs the whole prompt again" in can["whole answers"].reason
    assert "no attention and MLP" in can["heads and MLPs"].reason


def test_of_what_is_not_of_transformers_too() -> None:
    model = Model(plain_lm())
    found = verify(model, sae(site=Site(1)), left_padded(token_rows([6, 6], seed=3)))
    can = runs(model, found)
    assert [name for name, yes in can.items() if yes] == ["search", "transfer"]
    assert {name for name, holds in told(found).items() if holds is not True} == {"generation", "components"}


@pytest.mark.filterwarnings("ignore:Module 'model")
def test_a_model_that_cannot_be_run_from_a_site_on_is_refused_in_one_line() -> None:
    """Its blocks pass on a state beside the residual, which the blocks that are skipped would have made."""
    config = transformers.RwkvConfig(
        vocab_size=VOCAB, hidden_size=D_MODEL, attention_hidden_size=D_MODEL, num_hidden_layers=4
    )
    with pytest.raises(InputError, match=r"RwkvForCausalLM cannot be run from blocks\.2\.hook_resid_pre") as raised:
        verify(Model(transformers.RwkvForCausalLM(config).eval()), sae(), left_padded(ROWS))
    assert "\n" not in str(raised.value)


def test_an_sae_that_stands_in_has_the_right_width_and_tight_biases() -> None:
    model, prompts = Model(tiny_lm(scale=4.0)), left_padded(token_rows([40, 41], seed=5))
    drawn = stand_in(model, prompts, SITE)
    assert (drawn.d_model, drawn.d_sae, drawn.site) == (D_MODEL, 4 * D_MODEL, SITE)
    residual = model.run(prompts, read=[SITE]).residuals[SITE][prompts.positions > 0]
    active = (drawn.encode(residual) > 0).float().mean(dim=0)
    assert float(active.min()) >= 0.02  # of 79 tokens each feature has some
    assert 0.03 < float(active.mean()) < 0.07
    again, other = stand_in(model, prompts, SITE), stand_in(model, prompts, SITE, seed=1)
    assert torch.equal(drawn.W_enc, again.W_enc)
    assert not torch.equal(drawn.W_enc, other.W_enc)
    assert set(told(verify(model, drawn, left_padded(ROWS))).values()) == {True}
    with pytest.raises(InputError, match=r"blocks\.9"):
        stand_in(model, prompts, Site(9))


def saved(module: Any, folder: Path) -> str:
    """As `save_pretrained` writes it, with a tokenizer of a word a token."""
    module.save_pretrained(folder)
    words = {word: index for index, word in enumerate(["<unk>", *"abcdefghijklmnopqrstuvwxyz"])}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    transformers.PreTrainedTokenizerFast(tokenizer_object=core).save_pretrained(folder)
    return str(folder)


def test_the_command_without_an_sae_draws_one_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = saved(tiny_lm(scale=4.0, max_position_embeddings=512), tmp_path / "llama")
    assert main(["verify", "--model", folder, "--device", "cpu"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith(f"{folder} (folder, sha256:")
    assert out[0].endswith("in float32 on cpu")
    assert out[1] == "a random SAE (no --sae given) at blocks.2.hook_resid_pre"
    assert [line.split()[1] for line in out[3:15]] == ["holds"] * 12
    assert out[16:18] == [
        "Protocols this model supports",
        "search               yes  perturbations that leave the clamped features unchanged",
    ]
    assert main(["verify", "--model", folder, "--device", "cpu", "--site", "blocks.3.hook_resid_post"]) == 0
    assert capsys.readouterr().out.splitlines()[1].endswith("at blocks.3.hook_resid_post")
    assert main(["verify", "--model", folder, "--device", "cpu", "--site", "blocks.9.hook_resid_pre"]) == 2
    assert main(["verify", "--model", folder, "--device", "cpu", "--site", "head"]) == 2
    for line in capsys.readouterr().err.strip().splitlines():
        assert line.startswith("recover: ")


def test_the_command_tells_of_a_recurrent_model_and_refuses_an_encoder_with_a_decoder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = transformers.T5Config(vocab_size=61, d_model=D_MODEL, d_kv=4, d_ff=16, num_layers=2, num_heads=2)
    t5 = saved(transformers.T5ForConditionalGeneration(config), tmp_path / "t5")
    assert main(["verify", "--model", saved(mamba(), tmp_path / "mamba"), "--device", "cpu"]) == 0
    assert "prompts in batches   no   the recurrent state absorbs the padding" in capsys.readouterr().out
    assert main(["verify", "--model", t5, "--device", "cpu"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.strip().splitlines()
    assert "it has an encoder and a decoder (t5)" in line


def test_of_an_sae_it_says_whether_it_describes_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Laws hold of any SAE: of a signed basis, which describes everything, and of one with a longer decoder."""
    folder = saved(tiny_lm(scale=4.0, max_position_embeddings=512), tmp_path / "llama")
    signed = torch.cat([torch.eye(D_MODEL), -torch.eye(D_MODEL)], dim=1)
    for name, scale in (("fits", 1.0), ("other", 3.0)):
        module = random_sae("standard", d_model=D_MODEL, d_sae=2 * D_MODEL, hook_name=SITE.hook_name)
        zero = {"b_enc": torch.zeros(2 * D_MODEL), "b_dec": torch.zeros(D_MODEL)}
        module.load_state_dict({"W_enc": signed, "W_dec": scale * signed.T} | zero)
        module.save_model(tmp_path / name)
        assert main(["verify", "--model", folder, "--sae", str(tmp_path / name), "--device", "cpu"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[1] for line in lines[3:15]] == ["holds"] * 12
        fits = "yes  the SAE explains 1.000 of the variance at blocks.2.hook_resid_pre"
        assert lines[17].startswith(f"check with this SAE  {fits if name == 'fits' else 'no   the SAE explains -'}")
        assert lines[18].startswith("SAE at this site     ")
    assert "wrong model or wrong hook point?" in lines[17]


@pytest.mark.model
def test_the_command_verifies_smollm2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--model", "smollm2", "--sae", "smollm2-l15"]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[1] == "SAE smollm2-l15 at blocks.15.hook_resid_pre"
    assert [line.split()[1] for line in lines[3:15]] == ["holds"] * 12
    assert [line[21:24] for line in lines[17:]] == ["yes"] * 9
    assert main(["verify", "--model", "nowhere/at/all", "--sae", "smollm2-l15"]) == 2


@pytest.mark.model
@pytest.mark.slow
def test_the_command_verifies_gemma3_270m(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        names.resolve_model("gemma3-270m", "cpu")
    except InputError as error:
        pytest.skip(str(error))
    assert main(["verify", "--model", "gemma3-270m", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert [line.split()[1] for line in lines[3:15]] == ["holds"] * 12
    can = {line[:20].strip(): line[21:24] for line in lines[17:]}
    assert can.pop("task refusal") == "no "  # a base model has no chat template
    assert set(can.values()) == {"yes"}
