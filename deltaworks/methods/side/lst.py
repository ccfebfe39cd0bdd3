"""LST: ladder side-tuning for parameter and memory efficient transfer learning (Sung et al. 2022, arXiv:2206.06522).

s_0 = D_0 emb;  before side block i:  s <- g_i s + (1 - g_i) D_i h_i,  g_i = sigmoid(alpha_i / T), alpha_i = 0;
prediction = head(U norm(s)), the head frozen. h_i is the output of base block i, run without autograd and without
dropout; side blocks are blocks of the base's class, `reduction` times narrower, with the same number of heads. Side
decoders attend to side encoders. Side blocks start from the base's by structural pruning, with importances |W| or, as
in the paper, the Fisher information of the task; as in the authors' code the residual stream's entries are chosen anew
after every sub-layer. Heads that share keys keep the same rows (not in the paper, whose bases have none).
Use it when the base's activations do not fit: its backward pass is that of the side network alone.
"""

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_MAPPING, PreTrainedModel

from ...core import fields
from ...core.method import Batches, Method, Placed
from ...core.operators.ladder import Ladder, described, thin_model
from ...core.operators.pruned import prune_into, thinned
from ...core.operators.soft_prompt import parameters_of
from ...core.part import Shared
from ...core.registry import method
from ...model.anatomy import Anatomy, Site, Stack, describe
from ...model.weights import Weight
from ...statistics.gradients import fisher


@method("lst", paper="2206.06522", family="side")
class LST(Method):
    """Ladder side-tuning; trains a side network of about `1 / reduction**2` of the base's blocks, and its ladders."""

    overridable = False
    mergeable = False
    exact_at_start = False
    default_lr = 3e-3
    refuses = ("vit",)

    reduction: int = fields.positive(8, "r, by which the side network's widths are divided")
    keep: list[int] = fields.token_ids(
        "numbers of the blocks that have a side block, in every stack; none given for all (the paper drops every "
        "fourth of T5-base, every other of T5-large)"
    )
    temperature: float = fields.number(0.1, "T of the gates; alpha learns at 1 / T of the rate", above=0)
    init: str = fields.choice(
        "magnitude", ("magnitude", "fisher", "random"), "start of side blocks: by |W|, by the task's gradients, anew"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init == "fisher":
            object.__setattr__(self, "needs_data", True)

    def measure(self, base: Anatomy, batches: Batches) -> dict[int, Tensor]:
        """The squared gradients of every parameter, by the parameter's identity."""
        names = [name for name, _ in base.model.named_parameters()]
        return {id(base.model.get_parameter(name)): value for name, value in fisher(base.model, names, batches).items()}

    def assumed(self, base: Anatomy) -> None:
        """Nothing: a start by magnitude has the same shapes."""

    def parts(self, base: Anatomy, shared: dict[str, Shared], measured: Any) -> Iterator[Placed]:
        entrances = self._entrances(base)
        total = min(len(stack.blocks) for stack in base.stacks)
        kept = sorted(set(self.keep)) or list(range(total))
        if kept[-1] >= total:
            model = type(base.model).__name__
            raise ValueError(f"lst: keep={self.keep} names block {kept[-1]}, but {model} has {total}")
        config = described(thinned(base.model.config, self.reduction, kept))  # type: ignore[arg-type]
        thin = thin_model(config)
        anatomy = describe(thin)
        places = [_counterpart(thin, base.model.get_submodule(path), stack) for path, stack in entrances]
        if self.init != "random":
            backbones = [(place, path) for place, (path, _) in zip(places, entrances, strict=True)]
            prune_into(anatomy, base, backbones, kept, functools.partial(importance, measured))
        for place, (path, stack) in zip(places, entrances, strict=True):
            blocks = stack.path.removeprefix(f"{path}.")
            predicts = stack.name != "encoder" or not base.is_encoder_decoder
            ladder = Ladder(config, place, predicts, blocks, kept, int(base.hidden_size or 0), self.temperature)
            _start(ladder, thin.get_submodule(place), blocks)
            yield Placed(Site(path, role=None, kind="other", parameter=None), ladder, "ladder")

    def _entrances(self, base: Anatomy) -> list[tuple[str, Stack]]:
        """Path of each stack's backbone, which takes tokens or embeddings and runs its blocks."""
        model = base.model
        config = getattr(model, "config", None)
        known = isinstance(model, PreTrainedModel) and type(config) in MODEL_MAPPING
        found = []
        for stack in base.stacks if known else []:
            path = stack.path
            while path:
                path = path.rpartition(".")[0]
                if {"input_ids", "inputs_embeds"} <= set(parameters_of(type(model.get_submodule(path)))):
                    found.append((path, stack))
                    break
        if not found or len(found) < len(base.stacks):
            raise ValueError(
                f"lst builds a thin copy of a text model of transformers; {type(model).__name__} is none, take lora"
            )
        return found


def importance(measured: dict[int, Tensor] | None, weight: Weight) -> Tensor:
    """Scores of a weight's entries: the Fisher information where it was measured, the magnitude otherwise."""
    if measured is None:
        return weight.matrix().float().abs()
    value = weight.canonical(measured[id(weight.stored)].to(weight.device))
    return value if weight.rows is None else value.index_select(-2 if value.dim() > 1 else 0, weight.index())


def _counterpart(thin: nn.Module, layer: nn.Module, stack: Stack) -> str:
    """Path in a thin model of the backbone that corresponds to one of the base."""
    kind = getattr(type(layer), "_deltaworks_base", type(layer))
    paths = [path for path, module in thin.named_modules() if type(module) is kind]
    named = [path for path in paths if path.rpartition(".")[2] == stack.name]
    if not paths:
        raise ValueError(f"lst: a model made of this configuration has no {kind.__name__}; the base's class is another")
    return (named or paths)[0]


@torch.no_grad()
def _start(ladder: Ladder, thin: nn.Module, blocks: str) -> None:
    """Give the side network the values of a thin backbone."""
    values = thin.state_dict()
    for name, parameter in ladder.side.named_parameters():
        inside = name.removeprefix(f"{blocks}.")
        if inside != name:
            number, _, rest = inside.partition(".")
            if rest == "gate":
                continue
            name = f"{blocks}.{number}.{rest.removeprefix('block.')}"
        parameter.copy_(values[name])
