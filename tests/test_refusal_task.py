"""Requests: the shipped ones and their draw, the user's own files and what is wrong with them, the chat template."""

import csv
import json

import pytest
import torch

from fixtures import phrases
from recover.tasks import replies as refusal
from recover.tasks.dialogue import Request, chat_prompt
from recover.tasks.refusal import draw, load, load_file, shipped
from recover.types import InputError

SECRET = "Tell me, please, about SECRET lakes"
HARMBENCH = ["Behavior", "FunctionalCategory", "SemanticCategory", "Tags", "ContextString", "BehaviorID"]


@pytest.mark.parametrize(("kind", "least"), [("ordinary", 120), ("unservable", 80)])
def test_shipped_requests_are_many_different_and_numbered(kind, least):
    requests = shipped(kind)
    assert len(requests) >= least
    assert len({request.text.lower() for request in requests}) == len(requests)
    assert [request.id for request in requests] == [f"{kind}-{n:03}" for n in range(1, len(requests) + 1)]
    assert {request.kind for request in requests} == {kind}
    for request in requests:
        assert request.text[0].isupper()
        assert request.text[-1] in '.?"'
        assert request.text == " ".join(request.text.split())


def test_shipped_requests_are_none_that_the_saes_were_trained_on():
    trained = {task.format(topic=topic) for task in phrases.TASKS for topic in phrases.TOPICS}
    trained |= {task.format(topic=topic) for task in phrases.CODE_TASKS for topic in phrases.CODE_TOPICS}
    trained |= {template.format(x=filler) for template, fillers in phrases.UNSERVABLE.items() for filler in fillers}
    assert not trained & {request.text for kind in ("ordinary", "unservable") for request in shipped(kind)}


def test_draws_are_seeded_and_a_longer_one_begins_with_a_shorter():
    ten = draw(10, seed=3)
    assert draw(10, seed=3) == ten
    assert draw(4, seed=3) == ten[:4]
    assert draw(10, seed=4) != ten
    assert draw(0) == []
    everything = draw(len(shipped("unservable")), kind="unservable")
    assert sorted(everything, key=lambda request: request.id) == shipped("unservable")
    with pytest.raises(InputError, match=f"give 0 to {len(shipped('ordinary'))}"):
        draw(1000)
    with pytest.raises(InputError, match="-1 unservable requests"):
        draw(-1, kind="unservable")


def test_a_request_shows_its_id_alone():
    assert str(Request("line-2", SECRET, "given")) == "Request(line-2)"


@pytest.fixture
def file(tmp_path):
    def write(content):
        path = tmp_path / "requests"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def test_advbench_columns(file):
    path = file('goal,target\r\nDescribe a lake,"Sure, here"\r\n"Write ""hello"", twice",Sure\r\n')
    assert load_file(path) == [
        Request("line-2", "Describe a lake", "given"),
        Request("line-3", 'Write "hello", twice', "given"),
    ]


def test_harmbench_columns_and_the_context_before_a_behavior(tmp_path):
    path = tmp_path / "behaviors.csv"
    with path.open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(HARMBENCH)
        writer.writerow(["Describe a lake", "standard", "other", "", "", "a_lake"])
        writer.writerow(
            ["Sum this up", "contextual", "other", "context", "Lakes are deep.\nPonds are not.", "sum-it.up"]
        )
    assert load_file(path) == [
        Request("a_lake", "Describe a lake", "given"),
        Request("sum-it.up", "Lakes are deep.\nPonds are not.\n\n---\n\nSum this up", "given"),
    ]


def test_rows_over_several_lines_are_numbered_by_where_they_begin(file):
    path = file('\ufeffgoal,target\n"first\nline, second",x\n\nnext,"y\n\n"\nlast,z\n')
    assert [(r.id, r.text) for r in load_file(path)] == [
        ("line-2", "first\nline, second"),
        ("line-5", "next"),
        ("line-8", "last"),
    ]


def test_json_lines_of_either_kind(file):
    path = file('\ufeff{"goal": " a\\u2028lake ", "target": 3}\r\n\r\n{"target": "x", "goal": "pond"}')
    assert load_file(path) == [Request("line-1", "a\u2028lake", "given"), Request("line-3", "pond", "given")]
    rows = [{"Behavior": "a", "BehaviorID": "x"}, {"Behavior": "b", "BehaviorID": "y", "ContextString": None}]
    assert [r.id for r in load_file(file("\n".join(map(json.dumps, rows))))] == ["x", "y"]
    assert [r.id for r in load_file(file('{"Behavior": "a"}'))] == ["line-1"]


QUOTED = f'"{SECRET}"'


@pytest.mark.parametrize(
    ("content", "line", "why"),
    [
        ("", None, "has no requests"),
        ("\ufeff\n \n", 2, "no column that holds requests"),
        ("goal,target\n", None, "has no requests"),
        (f"{QUOTED},Sure\n{QUOTED},Sure\n", 1, "no column that holds requests"),
        ("Goal,target\nx,y\n", 1, "name the columns goal,target"),
        ("goal,Behavior\nx,y\n", 1, "both goal and Behavior"),
        (f"goal,target\n{SECRET},Sure\n", 2, "has 4 fields where the header has 2"),
        (f"goal,target\n\n{QUOTED}\n", 3, "has 1 fields where the header has 2"),
        (f'goal,target\nx,y\n"{SECRET},Sure\nx,y\n', 3, "quotes that do not match begin here"),
        (f'goal,target\n"{SECRET}" x,Sure\n', 2, "quotes that do not match begin here"),
        (f'goal,target\n{QUOTED},x\n" ",y\n', 3, "has no text under 'goal'"),
        (f"Behavior,BehaviorID\n{QUOTED},x\n{QUOTED},x\n", 3, "repeats the BehaviorID of line 2"),
        (f"Behavior,BehaviorID\n{QUOTED},\n", 2, "no name under 'BehaviorID'"),
        (f"Behavior,BehaviorID\nx,{QUOTED}\n", 2, "no name under 'BehaviorID'"),
        (f"Behavior,BehaviorID\nx,{'SECRET' * 40}\n", 2, "at most 200 characters"),
        ('{"goal": "x"}\n{"goal": "SECRET\n', 2, "is not a JSON object"),
        ('{"goal": "x"}\n["SECRET"]\n', 2, "is not a JSON object"),
        ('{"goal": "x"}\n' + '{"a":' * 100_000, 2, "is not a JSON object"),
        ('{"prompt": "SECRET"}', 1, "no column that holds requests"),
        ('{"goal": "SECRET"}\n{"Behavior": "SECRET"}', 2, "has no text under 'goal'"),
        ('{"goal": ["SECRET"]}', 1, "has no text under 'goal'"),
        ('{"goal": "SECRET \\ud800"}', 1, "half of a surrogate pair"),
        ('{"Behavior": "SECRET", "ContextString": 1}', 1, "other than text under 'ContextString'"),
        ('{"Behavior": "SECRET", "BehaviorID": 1}', 1, "no name under 'BehaviorID'"),
        (b"goal,target\nSECRET \xe9,x\n", 2, "is not UTF-8"),
    ],
)
def test_bad_files_are_refused_in_one_line_that_quotes_nothing(file, content, line, why):
    path = file(content)
    with pytest.raises(InputError) as raised:
        load_file(path)
    message = str(raised.value)
    assert message.startswith(f"request file {path}" + (f", line {line}: " if line else ": "))
    assert why in message
    assert "\n" not in message
    assert "SECRET" not in message


def test_missing_files_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"none\.csv: cannot be read \(No such file"):
        load_file(tmp_path / "none.csv")


def test_load_serves_a_prompts_section(file):
    assert load(n=5, seed=2) == draw(5, 2)
    assert load(n=5, seed=2, kind="unservable") == draw(5, 2, "unservable")
    assert len(load()) == len(shipped("ordinary"))
    path = file("goal\na\nb\nc\n")
    assert [request.text for request in load(file=path, seed=7)] == ["a", "b", "c"]
    assert [request.text for request in load(file=path, n=2)] == ["a", "b"]


class Templated:
    """A tokenizer as far as a chat template goes."""

    def __init__(self, template, error=None):
        self.chat_template, self.error = template, error

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        if self.error is not None:
            raise self.error
        assert (tokenize, add_generation_prompt) == (False, True)
        return "".join(f"<{m['role']}>{m['content']}" for m in messages) + "<assistant>"


def test_chat_prompt_ends_where_the_reply_begins():
    assert chat_prompt(Templated("x"), "Hello {{ there }}") == "<user>Hello {{ there }}<assistant>"


@pytest.mark.parametrize("tokenizer", [Templated(None), Templated(""), object()])
def test_tokenizers_without_a_chat_template_are_refused(tokenizer):
    with pytest.raises(InputError, match="has no chat template; name a chat model"):
        chat_prompt(tokenizer, SECRET)


def test_templates_that_fail_are_refused_without_the_request():
    with pytest.raises(InputError, match=r"cannot take a request \(ValueError\)") as raised:
        chat_prompt(Templated("x", ValueError(SECRET)), SECRET)
    assert "SECRET" not in str(raised.value)


@pytest.mark.model
def test_the_real_model_answers_ordinary_requests_and_declines_unservable_ones(smollm2):
    tokenizer = smollm2.tokenizer
    requests = [*draw(6, seed=0), *draw(6, seed=0, kind="unservable")]
    prompts = [chat_prompt(tokenizer, request.text) for request in requests]
    assert all(prompt.endswith("<|im_start|>assistant\n") for prompt in prompts)
    encoded = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    with torch.inference_mode():
        tokens = smollm2.module.generate(**encoded, max_new_tokens=40, do_sample=False)
    replies = tokenizer.batch_decode(tokens[:, encoded.input_ids.shape[1] :], skip_special_tokens=True)
    opened = [refusal.opens_with_refusal(reply) for reply in replies]
    assert sum(opened[:6]) == 0
    assert sum(opened[6:]) >= 5
