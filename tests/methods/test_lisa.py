"""Layer sampling."""

from __future__ import annotations

import copy
import math
from collections import Counter

import pytest
import torch
import transformers as hf
from torch import nn

import deltaworks as dw
from deltaworks.core.rule import Rules
from tests.families import DECODER, FAMILIES

BLOCKS = 4


def deep(**settings) -> tuple[nn.Module, dict, dw.Tuned]:
    """A decoder with four blocks, tied embedding and head."""
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER | {"num_hidden_layers": BLOCKS}, tie_word_embeddings=True))
    batch = FAMILIES["llama"]()[1]
    return model, batch, dw.attach(model, dw.LISA(**settings))


def block_of(name: str) -> int | None:
    return int(name.split(".")[2]) if ".layers." in name else None


def trained(model: nn.Module) -> set[int]:
    return {block_of(name) for name, p in model.named_parameters() if p.requires_grad} - {None}


def step(model: nn.Module, batch: dict, optimizer: torch.optim.Optimizer, rules: Rules) -> None:
    rules.emit("step_begin")
    model(**batch).loss.backward()
    rules.emit("gradients")
    optimizer.step()
    rules.emit("step_end")
    optimizer.zero_grad()


def start(tuned: dw.Tuned, steps: int = 100, seed: int = 0) -> tuple[torch.optim.Optimizer, Rules]:
    optimizer = torch.optim.AdamW(tuned.parameter_groups(1e-3, weight_decay=0.1))
    rules = tuned.run(steps, seed=seed, optimizer=optimizer)
    rules.emit("attached")
    return optimizer, rules


def test_exactly_gamma_blocks_move_in_a_window_and_the_rest_rests_bit_for_bit() -> None:
    model, batch, tuned = deep(layers=2, period=3)
    optimizer, rules = start(tuned)
    for number in range(9):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        step(model, batch, optimizer, rules)
        if number % 3 == 0:
            window = trained(model)
        assert trained(model) == window and len(window) == 2
        for name, p in model.named_parameters():
            rests = block_of(name) is not None and block_of(name) not in window
            assert torch.equal(p, before[name]) == rests, name


def test_every_subset_is_drawn_about_equally_often() -> None:
    _, _, tuned = deep(layers=2, period=1)
    _, rules = start(tuned)
    draws = 600
    for _ in range(draws):
        rules.emit("step_begin")
        rules.emit("step_end")
    subsets = Counter(tuple(blocks) for _, blocks in rules.run.history["lisa.blocks"])
    assert len(subsets) == math.comb(BLOCKS, 2)
    assert all(abs(count - draws / 6) < 45 for count in subsets.values())


def test_draws_depend_on_the_seed_alone() -> None:
    drawn = []
    for seed, noise in ((1, 5), (1, 6), (2, 5)):
        _, _, tuned = deep(layers=1, period=1)
        torch.manual_seed(noise)
        _, rules = start(tuned, seed=seed)
        for _ in range(12):
            rules.emit("step_begin")
            rules.emit("step_end")
        drawn.append(rules.run.history["lisa.blocks"])
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("state", ["drop", "keep"])
def test_the_optimizer_state_of_resting_blocks_is_dropped_or_kept(state: str) -> None:
    model, batch, tuned = deep(layers=1, period=1, state=state)
    optimizer, rules = start(tuned)
    seen: set[int] = set()
    for _ in range(8):
        step(model, batch, optimizer, rules)
        seen |= trained(model)
        held = {block_of(name) for name, p in model.named_parameters() if p in optimizer.state} - {None}
        assert held == (trained(model) if state == "drop" else seen)
    assert len(seen) > 1


def test_all_blocks_with_kept_state_is_full_fine_tuning() -> None:
    model, batch, tuned = deep(layers=BLOCKS, period=2, state="keep")
    plain = copy.deepcopy(model)
    dw.detach(plain)
    optimizer, rules = start(tuned)
    other = torch.optim.AdamW(plain.parameters(), 1e-3, weight_decay=0.1)
    for _ in range(4):
        step(model, batch, optimizer, rules)
        plain(**batch).loss.backward()
        other.step()
        other.zero_grad()
    assert torch.equal(model(**batch).logits, plain(**batch).logits)


def test_all_train_again_when_it_is_finished() -> None:
    model, batch, tuned = deep(layers=1)
    optimizer, rules = start(tuned)
    step(model, batch, optimizer, rules)
    assert len(trained(model)) == 1
    rules.emit("finished")
    assert trained(model) == set(range(BLOCKS))


def test_dropping_state_takes_an_optimizer() -> None:
    _, _, tuned = deep(layers=1)
    rules = tuned.run(1)
    rules.emit("attached")
    with pytest.raises(ValueError, match="give the optimizer"):
        rules.emit("step_begin")


def test_more_blocks_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match=r"layers=5 .* has 4; give at most that many"):
        deep(layers=5)
    with pytest.raises(ValueError, match=r"Cnn has 0|Cnn has 2"):
        dw.attach(FAMILIES["cnn"]()[0], dw.LISA(layers=3))
