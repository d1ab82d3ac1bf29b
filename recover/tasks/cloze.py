"""Cloze: facts with one-word answers, asked in several ways; a domain of them is to be forgotten.

The protocol of WMDP-Bio (paper: Settings) for models that are too small for the letters of multiple choice: paraphrases
stand in the place of the orders of the answers, and the other answers of the same relation in that of wrong choices.

1. *Facts* by domain and relation, shipped (`recover.tasks.prose`) or a file's.
2. *Filter*: a fact is kept where the model, without a defense, is right in every paraphrase.
3. *Examples* are the paraphrases of the kept facts of the domain to forget. A fact shows where its answer is likelier
   than every other answer of its relation; transfer is read with a stricter predicate, the likeliest of the vocabulary.
   Paraphrases of one fact are a group.
4. *Contrast*: prompts of that domain, and of all others, from which features by firing are selected.
"""

from __future__ import annotations

import difflib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from pydantic import PositiveInt

from recover.models.host import Edit, Model
from recover.tasks.behaviors import AnswerLikelihood, ChoiceMargin
from recover.tasks.examples import Contrast, Examples
from recover.tasks.files import read_text, rows_of, text_object
from recover.tasks.ioi import token_id
from recover.tasks.prose import RELATIONS
from recover.tasks.rules import OtherRule, next_of
from recover.types import InputError, Int, Progress, Site, Tensor

BATCH = 64
KEYS = 'the keys "domain", "prompts" and "answer"'


@dataclass(frozen=True)
class Fact:
    """A fact: its paraphrased prompts and the word that answers them; `str()` shows only the id.

    `subject` is what it is about; empty where that is not known apart from the prompts.
    """

    id: str
    domain: str
    relation: str
    prompts: tuple[str, ...]
    answer: str
    subject: str = ""

    def __repr__(self) -> str:
        return f"Fact({self.id})"


@dataclass(frozen=True, eq=False)
class Asked:
    """Facts tokenized for one model.

    Attributes:
        target: the answer's token.
        others: those of the other answers of its relation, repeated where a relation has fewer.
    """

    facts: Sequence[Fact]
    target: Int[Tensor, "fact"]
    others: Int[Tensor, "fact choice"]

    def select(self, rows: Sequence[int]) -> Asked:
        """Select a subset of facts."""
        index = torch.tensor(rows, dtype=torch.long, device=self.target.device)
        return Asked([self.facts[row] for row in rows], self.target[index], self.others[index])


def make_examples(
    model: Model,
    *,
    forget: str = "geography",
    n: PositiveInt | None = None,
    seed: int = 0,
    file: Path | str | None = None,
    progress: Progress | None = None,
) -> Examples:
    """Make examples of the paraphrases of one domain's facts that the model knows.

    Args:
        model: whose knowledge is asked first.
        forget: the domain.
        n: how many of the domain's facts that the model knows, drawn; by default all.
        seed: of the draw.
        file: a user's own facts (`load_file`).
        progress: called with ("asking", facts asked, facts).

    Raises:
        InputError: no such domain, none of its facts known in every way, or what `load_file` refuses.
    """
    facts = shipped() if file is None else load_file(file)
    domains = sorted({fact.domain for fact in facts})
    if forget not in domains:
        near = difflib.get_close_matches(forget, domains, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(domains)}"
        raise InputError(f"prompts.forget: there is no domain {forget!r}; {hint}")
    kept = known(model, facts, progress)
    wanted = [row for row, fact in enumerate(kept.facts) if fact.domain == forget]
    if not wanted:
        raise InputError(
            f"cloze: the model knows no fact of {forget!r} in all its ways; name another domain or a larger model"
        )
    wanted = random.Random(seed).sample(wanted, len(wanted))[:n]
    rows = torch.tensor([row for row in wanted for _ in kept.facts[row].prompts], device=model.device)
    told = [(fact, way, text) for fact in (kept.facts[row] for row in wanted) for way, text in enumerate(fact.prompts)]
    texts = [text for *_, text in told]
    prompts, target = model.tokenize(texts), kept.target[rows]
    # Of all its facts, drawn or not: the same features are selected whatever `n` is.
    shown = [text for fact in kept.facts if fact.domain == forget for text in fact.prompts]
    hidden = [text for fact in kept.facts if fact.domain != forget for text in fact.prompts]
    return Examples(
        [f"{fact.id}/{way}" for fact, way, _ in told],
        prompts,
        ChoiceMargin(target, kept.others[rows]),
        texts,
        AnswerLikelihood(target),
        contrast=Contrast(model.tokenize(shown), model.tokenize(hidden)) if hidden else None,
        groups=[fact.id for fact, *_ in told],
        rules=[rule.select(rows) for rule in other_rules(kept)],
    )


def other_rules(asked: Asked) -> tuple[OtherRule, ...]:
    """List other rules over facts: another member of the relation, and what else is known of the subject.

    1. Each answer of a relation is mapped to the next of them, by their tokens in a cycle.
    2. The answer of the subject in the next relation that it stands in, by the order of the facts; where there is none,
       as in 1. Left out where more than half of the facts have none, as then it is the first rule under another name.
    """
    pairs = zip(asked.target.tolist(), asked.others.tolist(), strict=True)
    another = torch.cat(
        [next_of(asked.target[row : row + 1], [own, *others]) for row, (own, others) in enumerate(pairs)]
    )
    stands: dict[str, list[int]] = {}
    for row, fact in enumerate(asked.facts):
        if fact.subject:
            stands.setdefault(fact.subject, []).append(row)
    elsewhere, found = another.clone(), 0
    for row, fact in enumerate(asked.facts):
        known = stands.get(fact.subject, [])
        later = sorted(known, key=lambda other: (other <= row, other))
        differs = [
            o for o in later if asked.facts[o].relation != fact.relation and asked.target[o] != asked.target[row]
        ]
        if differs:
            elsewhere[row], found = asked.target[differs[0]], found + 1
    rules = (OtherRule("another member of the relation", another),)
    if 2 * found < len(asked.facts):
        return rules
    return (*rules, OtherRule("another relation of the same subject", elsewhere))


def known(model: Model, facts: Sequence[Fact], progress: Progress | None = None) -> Asked:
    """Select the facts that the model answers correctly in every paraphrase, by the predicate of the task.

    Facts whose answer is not one token to the tokenizer, or whose relation has no second answer, are left out.

    Raises:
        InputError: none is left to ask.
    """
    asked = _asked(model, facts)
    if not asked.facts:
        raise InputError(
            f"cloze: of {len(facts)} facts none has an answer that is one token to this model's tokenizer, in a "
            "relation with another such answer"
        )
    answered = right(model, asked, progress=progress)
    return asked.select([row for row, ways in enumerate(answered) if all(ways)])


def right(
    model: Model, asked: Asked, edits: Mapping[Site, Edit] | None = None, progress: Progress | None = None
) -> list[tuple[bool, ...]]:
    """Test for each fact and paraphrase whether the model's answer is right, by the predicate of the task.

    `edits` are such as those of a defense (`recover.defenses.defended.clamp_edits`); `progress` as in `make_examples`.
    """
    # In the order of their lengths, so that little of a batch is padding.
    longest = [max(map(len, fact.prompts)) for fact in asked.facts]
    order, found = iter(sorted(range(len(longest)), key=longest.__getitem__)), {}
    while part := list(islice(order, BATCH // 4)):
        rows = torch.tensor([row for row in part for _ in asked.facts[row].prompts], device=model.device)
        behavior = ChoiceMargin(asked.target[rows], asked.others[rows])
        prompts = model.tokenize([text for row in part for text in asked.facts[row].prompts])
        with torch.no_grad():
            logits = model.run(prompts, edits=edits, tokens=behavior.tokens).logits.float()
        answers = iter((behavior.slack(logits) > 0).tolist())
        found.update({row: tuple(islice(answers, len(asked.facts[row].prompts))) for row in part})
        if progress is not None:
            progress("asking", len(found), len(longest))
    return [found[row] for row in range(len(longest))]


def _asked(model: Model, facts: Sequence[Fact]) -> Asked:
    tokens: dict[str, int] = {}
    for fact in facts:
        try:
            # In every paraphrase: what stands before may change how a word is written.
            (tokens[fact.id],) = {token_id(model.tokenizer, fact.answer, text) for text in fact.prompts}
        except (InputError, ValueError):
            continue
    relations: dict[tuple[str, str], list[int]] = {}
    for fact in facts:
        if fact.id in tokens:
            relations.setdefault((fact.domain, fact.relation), []).append(tokens[fact.id])
    answers = {kind: list(dict.fromkeys(known)) for kind, known in relations.items()}
    there = [f for f in facts if f.id in tokens and len(answers[f.domain, f.relation]) > 1]
    width = max((len(answers[fact.domain, fact.relation]) for fact in there), default=2) - 1
    others = []
    for fact in there:
        rivals = [token for token in answers[fact.domain, fact.relation] if token != tokens[fact.id]]
        others.append([rivals[place % len(rivals)] for place in range(width)])
    target = torch.tensor([tokens[fact.id] for fact in there], dtype=torch.long, device=model.device)
    return Asked(there, target, torch.tensor(others, dtype=torch.long, device=model.device).reshape(-1, width))


def shipped() -> list[Fact]:
    """All shipped facts, in the order of their relations."""
    return [
        Fact(
            f"{one.name}-{number:03}",
            one.domain,
            one.name,
            tuple(way.format(subject) for way in one.ways),
            answer,
            subject,
        )
        for one in RELATIONS
        for number, (subject, answer) in enumerate(one.pairs, start=1)
    ]


def load_file(path: Path | str) -> list[Fact]:
    """Read a user's own facts from JSON lines such as

    `{"domain": "rivers", "relation": "mouth", "prompts": ["The Rhine flows into the", ...], "answer": "sea"}`

    Prompts end right before the answer. Without a `relation` the whole domain is one. Ids are `line-N`.

    Raises:
        InputError: with the line number, and never with the text.
    """
    name = f"fact file {path}"
    text = read_text(Path(path), name)
    facts = rows_of(text, name, _fact, lambda fact: fact.prompts, "asks the same as line {}; delete one of them")
    if not facts:
        raise InputError(f"{name}: is empty; give lines with {KEYS}")
    return facts


def _fact(number: int, line: str) -> Fact:
    row = text_object(line, ("domain", "answer"), KEYS)
    relation = row.get("relation", "")
    if not isinstance(relation, str):
        raise InputError('the key "relation" must hold text, or be left out')
    prompts = row.get("prompts")
    if not isinstance(prompts, list) or not prompts or not all(isinstance(one, str) and one.strip() for one in prompts):
        raise InputError('the key "prompts" must hold a list of texts, one at least')
    if any(one != one.rstrip() for one in prompts):
        raise InputError("a prompt ends in white space; end it with its last word")
    if len(set(prompts)) < len(prompts):
        raise InputError("a prompt is given twice; each paraphrase needs its own words")
    return Fact(f"line-{number}", row["domain"].strip(), relation.strip(), tuple(prompts), row["answer"].strip())
