"""Full fine-tuning: every parameter of the base trains.

W' = W + dW, dW unrestricted. The measure for all other methods, in quality and in cost: optimizer state, gradients and
artifact are as large as the model times a constant. Running statistics of norms are no parameters and stay the base's.
Use it when memory allows and the task is far from what the base learned.
"""

from collections.abc import Iterator
from typing import Any

from ...core import fields
from ...core.attach import unfreeze
from ...core.method import Method, Placed
from ...core.part import Shared, Trained
from ...core.registry import method
from ...model.anatomy import Anatomy, Site
from ...model.kinds import GRAFT


@method("full", paper="none (the baseline)", family="fullparam")
class Full(Method):
    """Full fine-tuning; trains every parameter, or all parameters of the modules that `on` names."""

    overridable = False
    default_lr = 1e-5

    on: Any = fields.sites("everything", "what trains: everything, or roles, regular expressions or types of modules")

    def parts(self, base: Anatomy, shared: dict[str, Shared], measured: Any) -> Iterator[Placed]:
        yield from everything(base) if self.on == "everything" else unfreeze(base, self.on)


def everything(base: Anatomy) -> Iterator[Placed]:
    """A part for every parameter of a model, those that are tied once."""
    blocks = {f"{block.path}.": block.index for block in base.blocks}
    for name, _ in base.model.named_parameters():
        if GRAFT in name.split("."):
            continue
        path, _, parameter = name.rpartition(".")
        block = next((index for prefix, index in blocks.items() if name.startswith(prefix)), None)
        yield Placed(Site(path, None, "other", parameter, block=block), Trained(), f"trained_{parameter}")
