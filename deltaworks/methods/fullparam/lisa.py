"""LISA: layerwise importance sampling for memory-efficient LLM fine-tuning (Pan et al. 2024, arXiv:2403.17919).

Everything outside the blocks (embeddings, final norm, head) always trains. Before every `period`-th optimizer step
`layers` of the blocks are drawn uniformly without replacement; they train until the next draw, the others stand still.
The paper's sampling probabilities {1, gamma/N, ..., gamma/N, 1} are exactly this. Gradients of resting blocks are never
computed; their optimizer state is dropped, which the paper's memory figures suppose (its code, in LMFlow, keeps it).
Use it for full fine-tuning's reach at about the memory of LoRA.
"""

from collections.abc import Iterator
from typing import Any

import torch

from ...core import fields
from ...core.method import Method, Placed
from ...core.moments import restart
from ...core.part import Shared
from ...core.registry import method
from ...core.rule import Rule, Run
from ...model.anatomy import Anatomy
from .full import everything


@method("lisa", paper="2403.17919", family="fullparam")
class LISA(Method):
    """Layer sampling; trains everything outside the blocks and `layers` blocks at a time."""

    overridable = False
    default_lr = 2e-5

    layers: int = fields.positive(2, "gamma, blocks that train at a time; the paper takes 2, and 4 for 70B")
    period: int = fields.positive(20, "K, optimizer steps between two draws; 3 to 50")
    state: str = fields.choice("drop", ("drop", "keep"), "what becomes of a resting block's optimizer state")

    def parts(self, base: Anatomy, shared: dict[str, Shared], measured: Any) -> Iterator[Placed]:
        if len(base.blocks) < self.layers:
            raise ValueError(
                f"lisa draws layers={self.layers} blocks at a time but {type(base.model).__name__} has "
                f"{len(base.blocks)}; give at most that many, or take full"
            )
        yield from everything(base)

    def rules(self) -> list[Rule]:
        return [LayerSampling(self.layers, self.period, keep=self.state == "keep")]


class LayerSampling(Rule):
    """Lets a random few of the blocks train, anew every `period` steps.

    Attributes:
        active: indices of the blocks that train at present, ascending; empty before the first draw.
    """

    memory = ("active", "generator")

    def __init__(self, layers: int, period: int, *, keep: bool) -> None:
        self.layers, self.period, self.keep = layers, period, keep
        self.active: list[int] = []
        self.generator = torch.Generator()
        self._blocks: dict[int, list[torch.nn.Parameter]] | None = None

    def attached(self, run: Run) -> None:
        # The flags change only at the first step: an optimizer that is made between takes in every parameter.
        self.generator.manual_seed(run.seed)

    def resumed(self, run: Run) -> None:
        self._blocks = None  # so that the next step switches the blocks

    def step_begin(self, run: Run) -> None:
        draw = run.step % self.period == 0
        if draw:
            number = len(self._parameters(run))
            self.active = sorted(torch.randperm(number, generator=self.generator)[: self.layers].tolist())
            run.record("lisa.blocks", self.active)
        if draw or self._blocks is None:
            self._switch(run)

    def finished(self, run: Run) -> None:
        for parameters in self._parameters(run).values():
            for parameter in parameters:
                parameter.requires_grad_(True)

    def _switch(self, run: Run) -> None:
        if not self.keep and run.optimizer is None:
            raise ValueError("lisa drops optimizer state: give the optimizer (tuned.run(optimizer=...)) or state=keep")
        for index, parameters in self._parameters(run).items():
            for parameter in parameters:
                parameter.requires_grad_(index in self.active)
                if index not in self.active:
                    parameter.grad = None
                    if not self.keep:
                        restart(parameter, run.optimizer)

    def _parameters(self, run: Run) -> dict[int, list[torch.nn.Parameter]]:
        """The parameters of each block."""
        if self._blocks is None:
            self._blocks = {}
            for part in run.tuned.parts():
                if part.site.block is not None:
                    owner = run.tuned.model.get_submodule(part.site.path)
                    parameter = owner.get_parameter(part.site.parameter or "weight")
                    self._blocks.setdefault(part.site.block, []).append(parameter)
        return self._blocks
