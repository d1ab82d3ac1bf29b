"""The laws on models and SAEs that keep them, of every family; and each law on a model or an SAE that breaks it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from recover import verify as laws_of
from recover.activation import ReLU
from recover.cli import main
from recover.constraint import EncoderOrthogonal
from recover.model import Model, Suffix
from recover.sae import SAE
from recover.types import InputError, Site
from recover.verify import Law, verify
from tests.models import D_MODEL, FAMILIES, left_padded, tiny_lm, token_rows

ROWS = token_rows([7, 5, 6], seed=3)
verify_module = __import__("importlib").import_module("recover.verify")


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


@pytest.mark.parametrize("family", FAMILIES)
def test_all_laws_hold_for_every_family(family: str) -> None:
    found = verify(Model(tiny_lm(family, scale=4.0)), sae(), left_padded(ROWS))
    assert [law for law in found if law.holds is not True] == []
    assert len(found) == 9


def test_a_model_in_half_precision_is_measured_where_that_says_something() -> None:
    found = told(verify(Model(tiny_lm(scale=4.0).bfloat16()), sae(), left_padded(ROWS)))
    assert found.pop("gradient") is None
    assert set(found.values()) == {True}


BREAKS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "suffix": lambda patch: patch.setattr(Suffix, "logits", lambda self, *_, **__: torch.zeros(3, 61)),
    "blindness": lambda patch: patch.setattr(EncoderOrthogonal, "project", lambda self, delta: delta),
    "decomposition": lambda patch: patch.setattr(
        verify_module, "decompose", lambda sae, x: replace(REAL(sae, x), error=0 * x)
    ),
}
REAL = verify_module.decompose


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


def test_an_encoder_with_a_decoder_is_refused_and_a_recurrent_model_is_told_of() -> None:
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=61, d_model=D_MODEL, d_kv=4, d_ff=16, num_layers=2, num_heads=2)
    )
    with pytest.raises(InputError, match="T5ForConditionalGeneration has an encoder and a decoder"):
        Model(t5)
    options = {"hidden_size": D_MODEL, "state_size": 4, "num_hidden_layers": 4, "vocab_size": 61}
    module = transformers.MambaForCausalLM(transformers.MambaConfig(**options)).eval()
    found = {law.name: law for law in verify(Model(module), sae(), left_padded(ROWS))}
    assert found["batching"].holds is None
    assert "prompts run one at a time" in found["batching"].detail


@pytest.mark.model
def test_the_command_verifies_smollm2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--model", "smollm2", "--sae", "smollm2-l15"]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert [line.split()[1] for line in lines] == ["holds"] * 9
    assert main(["verify", "--model", "nowhere/at/all", "--sae", "smollm2-l15"]) == 2
