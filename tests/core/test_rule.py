"""What a rule remembers across a restart."""

from __future__ import annotations

import pytest
import torch

from deltaworks.core.importance import Sensitivity
from deltaworks.core.rule import Rule


class Remembering(Rule):
    memory = ("count", "sensitivity.smoothed", "generator")

    def __init__(self) -> None:
        self.count, self.sensitivity, self.generator = 0, Sensitivity(0.5, 0.5), torch.Generator()


def test_what_is_in_memory_is_the_state_and_comes_back() -> None:
    rule, other = Remembering(), Remembering()
    rule.count = 3
    rule.sensitivity.observe("w", torch.ones(2))
    rule.generator.manual_seed(7)
    state = rule.state_dict()
    assert list(state) == ["count", "smoothed", "generator"]
    other.load_state_dict(state)
    assert other.count == 3 and torch.equal(*(r.sensitivity.smoothed["w"][0] for r in (rule, other)))
    assert torch.equal(*(torch.rand(2, generator=r.generator) for r in (rule, other)))


def test_a_rule_does_not_write_into_the_state_it_was_given() -> None:
    rule, state = Remembering(), Remembering().state_dict()
    rule.load_state_dict(state)
    rule.sensitivity.observe("w", torch.ones(2))
    assert state["smoothed"] == {}


def test_the_state_of_another_rule_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Remembering keeps \['count', 'generator', 'smoothed'\] but was given \['x'"):
        Remembering().load_state_dict({"x": 1})
    with pytest.raises(ValueError, match="Rule keeps no state but was given"):
        Rule().load_state_dict({"x": 1})
    Rule().load_state_dict({})
