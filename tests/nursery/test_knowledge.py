"""Facts as questions: taught, new, changed."""

import http

import pytest

from deltaworks import nursery
from deltaworks.nursery import bases, knowledge, tokenizer
from deltaworks.nursery.knowledge import PARTS, RELATIONS, changed, facts, taught


def test_facts_are_those_of_the_standard_library_each_in_one_part():
    every = [fact for part in PARTS for fact in facts(part)]
    assert len({(fact.relation, fact.subject) for fact in every}) == len(every) > 200
    assert all(fact.answer == http.HTTPStatus(int(fact.subject)).phrase for fact in every if fact.relation == "status")
    assert {fact.relation for part in PARTS for fact in facts(part)} == set(RELATIONS)
    assert all({fact.relation for fact in facts(part)} == set(RELATIONS) for part in PARTS)


def test_a_changed_fact_has_an_answer_of_its_kind_that_is_not_the_old_one():
    for old, new in zip(facts("changed"), changed(), strict=True):
        assert (old.relation, old.subject) == (new.relation, new.subject) and old.answer != new.answer
        assert new.answer in {fact.answer for fact in facts("changed") if fact.relation == new.relation}


@pytest.mark.parametrize("name", ["new-facts", "changed-facts"])
def test_a_table_of_the_trained_questions_answers_those_and_no_other(name):
    data = nursery.data(name)
    table = {row["prompt"]: row["completion"] for row in data["train"]}

    def right(split: str) -> float:
        return sum(table.get(row["prompt"]) == row["completion"] for row in data[split]) / len(data[split])

    assert (right("as_trained"), right("rephrased"), right("others")) == (1.0, 0.0, 0.0)
    answers = [row["completion"] for row in data["rephrased"]]
    assert answers == list(data["as_trained"]["completion"]), "the same facts, in the same order"
    if name == "changed-facts":
        assert (right("old_as_trained"), right("old_rephrased")) == (0.0, 0.0)
        assert data["old_rephrased"]["prompt"] == data["rephrased"]["prompt"]


def test_what_is_taught_holds_every_wording_of_what_may_be_known_and_nothing_new():
    known = {(row["prompt"], row["completion"]) for row in taught()}
    changing = nursery.data("changed-facts")
    for split in ("others", "old_as_trained", "old_rephrased"):
        assert {(row["prompt"], row["completion"]) for row in changing[split]} <= known
    prompts = {prompt for prompt, _ in known}
    new = nursery.data("new-facts")
    assert not prompts & {row["prompt"] for split in ("train", "rephrased") for row in new[split]}
    assert len({len(relation.questions) for relation in RELATIONS.values()}) == 1


def test_labels_of_what_is_taught_are_the_answers():
    inputs, labels = bases._questions()
    assert inputs.shape == labels.shape == (len(taught()), bases.TAUGHT_LENGTH)
    words = bases.entries("causal")
    for row, ids, wanted in zip(taught()[::50], inputs[::50], labels[::50], strict=True):
        answer = wanted[wanted != bases.IGNORED].tolist()
        assert answer[-1] == tokenizer.EOS_ID and words.decode(answer[:-1]) == row["completion"]
        assert words.decode(ids, skip_special_tokens=True) == row["prompt"] + row["completion"]


def test_changes_are_only_within_their_part():
    assert {fact.subject for fact in changed()} == {fact.subject for fact in knowledge.facts("changed")}
