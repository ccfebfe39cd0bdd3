"""Choosing between texts: the losses of T-Few (Liu et al. 2022, arXiv:2205.05638, section 3.2), and what is chosen.

With ce_t = -log p(y_t | x, y_<t) for the tokens of a choice c, and n_c how many they are,

    beta_c = sum_t ce_t / n_c^p,
    L_lm = mean of ce_t over the tokens of the right choices of a batch,
    L_ln = CE(softmax_c(-beta_c), right one),
    L_ul = -mean of log(1 - p(y_t) + 0.01) over the tokens of the wrong choices of a batch,
    L = L_lm + L_ln + L_ul,  chosen: argmin_c beta_c.

The 0.01, which keeps the logarithm finite, is the official code's and not in the paper. That code also lets every
place that is masked add -log(1.01) to L_ul; here only tokens of wrong choices do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

LOSSES = ("t-few", "lm")
"""What is learned: all three terms, or the likelihood of the right choice alone."""
IGNORED, FLOOR = -100, 1e-2


@dataclass(frozen=True)
class Choices:
    """What a model thinks of the choices of a batch of questions.

    Attributes:
        ce: negative log-likelihood of every token of every choice.
        sequence: the choice that a token belongs to.
        question: the question that a choice belongs to; ascending, from 0 on.
        right: which choices are the right ones.
    """

    ce: Float[Tensor, " tokens"]
    sequence: Int[Tensor, " tokens"]
    question: Int[Tensor, " choices"]
    right: Bool[Tensor, " choices"]

    @classmethod
    def of(cls, logits: Tensor, labels: Tensor, question: Tensor, right: Tensor) -> Choices:
        """From a model's logits (`choices x length x vocabulary`) and labels (`choices x length`, -100 for none)."""
        targets = labels[:, 1:]
        sequence, place = (targets != IGNORED).nonzero(as_tuple=True)
        ce = functional.cross_entropy(logits[sequence, place].float(), targets[sequence, place], reduction="none")
        return cls(ce, sequence, question, right)

    def scores(self, power: float = 1.0) -> Float[Tensor, " choices"]:
        """beta_c; the length counts as n_c^power, with power 0 not at all."""
        total = torch.zeros(len(self.right), dtype=self.ce.dtype, device=self.ce.device)
        count = torch.bincount(self.sequence, minlength=len(self.right))
        return total.index_add(0, self.sequence, self.ce) / count.to(self.ce.dtype) ** power

    def by_question(self, scores: Float[Tensor, " choices"]) -> Float[Tensor, "questions most"]:
        """-beta, a row for each question, -inf where it has fewer choices than others."""
        count = torch.bincount(self.question)
        first = count.cumsum(0) - count
        place = torch.arange(len(scores), device=scores.device) - first[self.question]
        table = scores.new_full((len(count), int(count.max())), -torch.inf)
        return table.index_put((self.question, place), -scores)

    def answers(self) -> Int[Tensor, " questions"]:
        """The place of the right choice of each question."""
        return self.by_question(-self.right.float()).argmax(-1)

    def chosen(self, power: float = 1.0) -> Int[Tensor, " questions"]:
        """The place of the choice that the model takes."""
        return self.by_question(self.scores(power)).argmax(-1)

    def likelihood(self) -> Float[Tensor, ""]:
        """L_lm."""
        return self.ce[self.right[self.sequence]].mean()

    def length_normalised(self, power: float = 1.0) -> Float[Tensor, ""]:
        """L_ln, the mean over questions."""
        return functional.cross_entropy(self.by_question(self.scores(power)), self.answers())

    def unlikelihood(self) -> Float[Tensor, ""]:
        """L_ul; 0 where no question has a wrong choice."""
        wrong = self.ce[~self.right[self.sequence]]
        return -torch.log(1 + FLOOR - torch.exp(-wrong)).mean() if len(wrong) else self.ce.new_zeros(())

    def loss(self, kind: str = "t-few") -> Float[Tensor, ""]:
        """One of `LOSSES`."""
        if kind == "lm":
            return self.likelihood()
        return self.likelihood() + self.length_normalised() + self.unlikelihood()


def choose(model: Any, batch: dict[str, Any]) -> Choices:
    """What a causal language model thinks of a batch that `data.collate.ChoiceCollator` made."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return Choices.of(logits, batch["labels"], batch["question"], batch["right"])
