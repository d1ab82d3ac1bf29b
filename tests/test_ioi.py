"""IOI prompts: shaped as in the original task; names against byte-pair and SentencePiece-like tokenizers."""

import json
import re
from collections import Counter

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from recover.tasks import get_task, ioi
from recover.types import InputError

SPLIT_NAME = "Elizabeth"


@pytest.fixture(scope="module", params=["byte-pair", "sentencepiece"])
def tokenizer(request):
    """Knows each built-in name but Elizabeth as one token; writes a space as Ġ, or as ▁ like Gemma."""
    core = Tokenizer(models.BPE())
    if request.param == "byte-pair":
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        alphabet = [chr(code) for code in range(33, 127)] + ["▁"]
    text = [f"x {name}" for name in ioi.NAMES if name != SPLIT_NAME] + list(ioi.FRAMES)
    trainer = trainers.BpeTrainer(
        vocab_size=4000, initial_alphabet=alphabet, special_tokens=["<s>"], show_progress=False
    )
    core.train_from_iterator(text * 2, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>")


def words(prompt):
    return re.findall(r"[A-Z]\w+", prompt)


def test_token_is_the_one_that_decodes_to_the_name_after_a_space(tokenizer):
    token = ioi.token_id(tokenizer, "Mary", "When Paul and Mary met at the park, Paul gave it to")
    assert tokenizer.convert_ids_to_tokens(token) in ("ĠMary", "▁Mary")


@pytest.mark.parametrize("name", [SPLIT_NAME, "Mary Jane"])
def test_names_of_several_tokens_are_refused(tokenizer, name):
    with pytest.raises(InputError, match="single token"):
        ioi.token_id(tokenizer, name)


def test_a_name_that_changes_the_tokens_before_it_is_refused():
    def merging(text, add_special_tokens):
        return {"input_ids": [9, 7] if text.endswith("Mary") else [1]}

    with pytest.raises(InputError, match="single token"):
        ioi.token_id(merging, "Mary")


def test_names_are_those_of_the_tokenizer(tokenizer):
    names = ioi.single_token_names(tokenizer)
    assert set(names) == set(ioi.NAMES) - {SPLIT_NAME}
    assert SPLIT_NAME not in {name for e in ioi.generate(tokenizer, 300, 0) for name in (e.io, e.subject)}


def test_names_that_share_a_token_count_once():
    def one_token_for_all(text, add_special_tokens):
        return {"input_ids": [1] * len(text.split())}

    assert ioi.single_token_names(one_token_for_all) == ["Mary"]


def test_prompts_have_the_shape_of_the_original_task(tokenizer):
    for example in ioi.generate(tokenizer, 200, seed=3):
        assert example.prompt.endswith(" to")
        assert example.io != example.subject
        names = [word for word in words(example.prompt) if word in ioi.NAMES]
        a, b = example.io, example.subject
        assert names == {"BABA": [b, a, b], "ABBA": [a, b, b]}[example.template]


def test_draws_are_balanced(tokenizer):
    examples = ioi.generate(tokenizer, 64, seed=0)
    assert Counter(e.template for e in examples) == {"BABA": 32, "ABBA": 32}
    # The first word tells the ten frames apart; 32 draws of a template deal each frame three or four times.
    frames = Counter((e.template, e.prompt.split()[0]) for e in examples)
    assert len(frames) == 20
    assert set(frames.values()) == {3, 4}
    # 64 draws from decks of 59 names deal each one once, and five of them again.
    assert set(Counter(e.io for e in examples).values()) == {1, 2}
    assert len({e.prompt for e in examples}) == 64


@pytest.mark.parametrize("template", ["BABA", "ABBA"])
def test_each_template_has_at_least_eight_wordings(tokenizer, template):
    examples = ioi.generate(tokenizer, 10, 0, [template])
    assert {e.template for e in examples} == {template}
    assert len({e.prompt.split()[0] for e in examples}) >= 8


def test_seeded_and_a_longer_draw_begins_with_a_shorter(tokenizer):
    examples = ioi.generate(tokenizer, 50, seed=1)
    assert ioi.generate(tokenizer, 50, seed=1) == examples
    assert ioi.generate(tokenizer, 20, seed=1) == examples[:20]
    assert ioi.generate(tokenizer, 50, seed=2) != examples


def test_a_prompt_drawn_again_is_skipped(tokenizer, monkeypatch):
    monkeypatch.setattr(ioi, "single_token_names", lambda tokenizer: ["Mary", "John"])
    for key in ("FRAMES", "PLACES", "OBJECTS"):
        monkeypatch.setattr(ioi, key, getattr(ioi, key)[:2])
    # 2 name orders x 2 templates x 2 frames x 2 places x 2 objects = 32 prompts, of which half may be drawn.
    assert len({e.prompt for e in ioi.generate(tokenizer, 16, 0)}) == 16
    with pytest.raises(InputError, match="at most 16"):
        ioi.generate(tokenizer, 17, 0)


def test_ids_are_of_the_content_and_say_nothing_of_it(tokenizer):
    examples = ioi.generate(tokenizer, 64, 0)
    assert len({e.id for e in examples}) == 64
    example = examples[0]
    assert ioi.IOIExample.of(example.prompt, example.io, example.subject, example.template) == example
    assert example.io not in str(example)
    assert example.id == ioi.generate(tokenizer, 1, 0)[0].id


@pytest.fixture
def file(tmp_path):
    def write(*lines):
        path = tmp_path / "prompts.jsonl"
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        path.write_text("\n".join(texts) + "\n")
        return path

    return write


SECRET = "When Mary and John met at the park, John gave SECRET to"
ROW = {"prompt": SECRET, "io": "Mary", "subject": "John"}


def test_file_gives_its_prompts_in_order(tokenizer, file):
    turned = {**ROW, "io": "John", "subject": "Mary", "note": "other keys are left alone"}
    examples = ioi.load_jsonl(file(ROW, "", turned), tokenizer)
    assert examples == [
        ioi.IOIExample.of(SECRET, "Mary", "John", "ABBA"),
        ioi.IOIExample.of(SECRET, "John", "Mary", "BABA"),
    ]


def test_file_with_byte_order_mark_and_windows_line_ends(tokenizer, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(ROW).encode() + b"\r\n\r\n")
    assert [e.io for e in ioi.load_jsonl(path, tokenizer)] == ["Mary"]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ('{"prompt": "SECRET', "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ('["SECRET"]', "must be a JSON object"),
        ({"prompt": SECRET, "io": "Mary"}, 'the key "subject"'),
        ({**ROW, "prompt": " "}, 'the key "prompt"'),
        ({**ROW, "io": 3}, 'the key "io"'),
        ({**ROW, "prompt": SECRET + " "}, "white space"),
        ({**ROW, "io": "John"}, "same name"),
        ({**ROW, "io": "Paul"}, "both occur in the prompt"),
        ({**ROW, "io": "Mar"}, "both occur in the prompt"),
        (
            {
                "prompt": "Then Elizabeth and John met, and John gave SECRET to",
                "io": SPLIT_NAME,
                "subject": "John",
            },
            "the name 'Elizabeth' is not a single token",
        ),
        (ROW, "repeats line 1"),
    ],
)
def test_bad_lines_are_named_by_number_and_never_quoted(tokenizer, file, line, why):
    path = file(ROW, "", line)
    with pytest.raises(InputError) as raised:
        ioi.load_jsonl(path, tokenizer)
    message = str(raised.value)
    assert message.startswith(f"prompt file {path}, line 3: ")
    assert why in message
    assert "\n" not in message
    assert "SECRET" not in message


@pytest.mark.parametrize("lines", [[], ["", "  "]])
def test_empty_files_are_refused(tokenizer, file, lines):
    with pytest.raises(InputError, match="is empty"):
        ioi.load_jsonl(file(*lines), tokenizer)


def test_unreadable_files_are_refused(tokenizer, tmp_path):
    with pytest.raises(InputError, match="No such file"):
        ioi.load_jsonl(tmp_path / "none.jsonl", tokenizer)
    path = tmp_path / "latin.jsonl"
    path.write_bytes(json.dumps(ROW).encode() + b"\n\xe9\n")
    with pytest.raises(InputError, match="line 2: is not UTF-8"):
        ioi.load_jsonl(path, tokenizer)


def test_load_serves_a_prompts_section(tokenizer, file):
    assert get_task("ioi") is ioi.make_examples
    assert len(ioi.load(tokenizer)) == 64
    assert ioi.load(tokenizer, n=4, seed=5) == ioi.generate(tokenizer, 4, 5)
    turned = {**ROW, "io": "John", "subject": "Mary"}
    path = file(ROW, turned)
    assert len(ioi.load(tokenizer, file=path)) == 2
    assert [e.io for e in ioi.load(tokenizer, file=path, n=1)] == ["Mary"]
    assert [e.io for e in ioi.load(tokenizer, file=path, templates=["BABA"])] == ["John"]
    with pytest.raises(InputError, match="no prompt has the name order BABA"):
        ioi.load(tokenizer, file=file(ROW), templates=["BABA"])


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("ioii", "did you mean 'ioi'"),
        ("zzz", "known: ioi, choice, cloze, probe, refusal"),
        ("python:no_such_module:b", r"cannot be imported \(ModuleNotFoundError"),
        ("python:recover.tasks.ioi:no_such", r"cannot be imported \(AttributeError"),
        ("python:recover.tasks.ioi:NAMES", "is no function"),
        ("python:recover", "write python:module:object"),
    ],
)
def test_unknown_tasks_are_refused(name, why):
    with pytest.raises(InputError, match=why):
        get_task(name)


@pytest.mark.model
def test_the_real_model_knows_the_names_and_the_task(smollm2):
    tokenizer = smollm2.tokenizer
    assert len(ioi.single_token_names(tokenizer)) >= 40
    right = 0
    for example in ioi.generate(tokenizer, 16, seed=0):
        ids = tokenizer(example.prompt, return_tensors="pt").input_ids
        logits = smollm2.module(ids).logits[0, -1]
        io, subject = (ioi.token_id(tokenizer, name, example.prompt) for name in (example.io, example.subject))
        right += bool(logits[io] > logits[subject])
    assert right >= 15


def test_the_strict_predicate_sets_every_name_against_the_right_one(tokenizer):
    asked = ioi.generate(tokenizer, 6, seed=0)
    behavior = ioi.strict(tokenizer, asked)
    names = {ioi.token_id(tokenizer, name) for name in ioi.NAMES if name != SPLIT_NAME}
    for example, target, others in zip(asked, behavior.target.tolist(), behavior.others.tolist(), strict=True):
        assert target == ioi.token_id(tokenizer, example.io)
        assert others[0] == ioi.token_id(tokenizer, example.subject)
        assert sorted([target, *others]) == sorted(names)


def test_names_of_a_file_that_are_none_of_ours_compete_with_ours(tokenizer):
    """As many candidates in every prompt, none of them twice, the own two first."""
    (ours,) = ioi.generate(tokenizer, 1, seed=0)
    prompt = "When the and John met at the park, John gave it to"
    foreign = ioi.IOIExample.of(prompt, "the", "John", "ABBA")
    one, other = ioi.strict(tokenizer, [ours, foreign]).tokens.tolist()
    names = {ioi.token_id(tokenizer, name) for name in ioi.single_token_names(tokenizer)}
    assert len(one) == len(other) == len(set(other)) == len(names)
    assert set(one) == names
    assert other[:2] == [ioi.token_id(tokenizer, name, prompt) for name in ("the", "John")]
    assert set(other) - names == {other[0]}
