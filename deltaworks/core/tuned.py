"""`Tuned`: what `attach` returns, a handle on one adapter in a model."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .attach import State, named_parts, state_of
from .experts import kind_of
from .graft import graft_of, vacate
from .method import Method
from .part import Part, Shared, Trained
from .rule import Rule, Rules, Run


@dataclass(frozen=True)
class Row:
    """One line of a summary: a site, the part there, its trainable and stored sizes."""

    path: str
    label: str
    kind: str
    shapes: str
    trainable: int
    stored: int


@dataclass(frozen=True)
class Summary:
    """What an adapter is: its sites, sizes and shares. Printing it gives a table."""

    name: str
    method: str
    rows: list[Row]
    trainable: int
    total: int
    stored_bytes: int

    @property
    def share(self) -> float:
        """Trainable parameters over the base's, 0 to 1."""
        return self.trainable / max(self.total, 1)

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table

        table = Table(title=f"{self.name}: {self.method}", title_justify="left")
        for column, justify in (("site", "left"), ("part", "left"), ("shapes", "left"), ("trainable", "right")):
            table.add_column(column, justify=justify, overflow="fold")  # type: ignore[arg-type]
        for path, kind, shapes, count, number in _folded_rows(self.rows):
            table.add_row(path + (f"  (x{number})" if number > 1 else ""), kind, shapes, f"{count:,}")
        out = io.StringIO()
        console = Console(file=out, width=110, highlight=False)
        console.print(table)
        console.print(
            f"trainable {self.trainable:,} of {self.total:,} ({100 * self.share:.3f} %), "
            f"saved as {self.stored_bytes:,} bytes"
        )
        return out.getvalue()


def _folded_rows(rows: list[Row]) -> list[tuple[str, str, str, int, int]]:
    """Rows that differ only in the block's number as one."""
    import re

    folded: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        place = re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.)", "*", f"{row.path}.{row.label}")
        folded.setdefault((place, row.kind, row.shapes), []).append(row)
    return [
        (place, kind, shapes, sum(row.trainable for row in group), len(group))
        for (place, kind, shapes), group in folded.items()
    ]


class Tuned:
    """One adapter in a model.

    Attributes:
        model: the adapted model, changed in place.
        name: the adapter's name in it.
        method: the method that made it.
    """

    def __init__(self, model: nn.Module, name: str) -> None:
        self.model, self.name = model, name
        self._rules: list[Rule] | None = None

    @property
    def state(self) -> State:
        return state_of(self.model)

    @property
    def method(self) -> Method:
        return self.state.adapters[self.name].method

    @property
    def shared(self) -> dict[str, Shared]:
        """What parts of the adapter borrow, by name."""
        return self.state.adapters[self.name].shared

    def parts(self) -> Iterator[Part]:
        """The adapter's parts, in order of attachment."""
        return (part for _, part in named_parts(self.model, self.name))

    def named_parts(self) -> Iterator[tuple[str, Part]]:
        """`<module path>.<label>` and part."""
        return named_parts(self.model, self.name)

    def of_kind(self, *kinds: type[Part]) -> Iterator[tuple[str, Any]]:
        """Name and part of the parts of some kinds, stacks of them included."""
        names = {kind.__name__ for kind in kinds}
        return ((name, part) for name, part in self.named_parts() if kind_of(part) in names)

    def tensors_of(self, kind: type[Part], *keys: str) -> Iterator[tuple[str, tuple[nn.Parameter, ...]]]:
        """Name and some parameters of the parts of a kind; stacks hold theirs along a leading axis."""
        return ((name, tuple(part.get_parameter(key) for key in keys)) for name, part in self.of_kind(kind))

    def exchange(self, name: str, part: Part, shared: Mapping[str, Shared] | None = None) -> None:
        """Put a part into the place of another, as one that trained in another form than it serves.

        Args:
            name: the old part's name, as in `named_parts`.
            part: the new one; shared tensors that nothing borrows any more go.
            shared: what the new part borrows, by the constructor argument that received it.
        """
        old = dict(self.named_parts())[name]
        path, _, label = name.rpartition(".")
        found = graft_of(self.model.get_submodule(path))
        assert found is not None
        part.site = old.site
        part.train(old.training)
        found.add(self.name, label, part)
        self.shared.update(shared or {})
        self._forget()

    def remove(self, name: str) -> None:
        """Take a part out of the adapter, as one that turned out to be of no use.

        Args:
            name: as in `named_parts`.

        Raises:
            ValueError: when it is the last one.
        """
        adapter = self.state.adapters[self.name]
        if len(adapter.places) == 1:
            raise ValueError(f"{name} is all that the adapter {self.name!r} has; detach the adapter instead")
        path, _, label = name.rpartition(".")
        module = self.model.get_submodule(path)
        found = graft_of(module)
        assert found is not None
        slot = found.get_submodule(self.name)
        del slot._modules[label]
        if not len(slot._modules):
            del found._modules[self.name]
        found.__dict__.pop("_known", None)  # what it remembers of what acts
        adapter.places.remove((path, label))
        vacate(module)
        self._forget()

    def _forget(self) -> None:
        """Let go of shared tensors that nothing borrows."""
        adapter = self.state.adapters[self.name]
        lent = {key for other in self.parts() for key in other.borrowed}
        adapter.shared = {key: module for key, module in adapter.shared.items() if key in lent}

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Everything of this adapter that receives gradients; a base parameter under its own name."""
        seen: set[int] = set()
        for name, part in self.named_parts():
            if isinstance(part, Trained):
                parameter = self.model.get_parameter(_join(part.site.path, part.site.parameter or "weight"))
                own = [(_join(part.site.path, part.site.parameter or "weight"), parameter)]
            else:
                own = [(f"{name}.{inner}", parameter) for inner, parameter in part.named_parameters()]
            for full, parameter in own:
                if parameter.requires_grad and id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield full, parameter

    def parameters(self) -> list[nn.Parameter]:
        """The tensors that receive gradients, each once."""
        return [parameter for _, parameter in self.named_parameters()]

    def parameter_groups(self, lr: float, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        """Groups for any `torch.optim` optimizer: the method's own rates and decays, the run's elsewhere.

        What trains of the base itself, such as a new head, has the run's.

        Args:
            lr: learning rate of the run; methods with several rates scale it.
            weight_decay: decay of the run; methods that must not decay some tensors override it.
        """
        groups: dict[tuple, dict[str, Any]] = {}
        places = (part.site for _, part in self.named_parts() if isinstance(part, Trained))
        in_place = {_join(site.path, site.parameter or "weight") for site in places}
        kinds: dict[int, set[str]] = {}
        for part in self.parts():
            for parameter in part.parameters():
                kinds.setdefault(id(parameter), set()).add(part.site.kind)
        for name, parameter in self.named_parameters():
            own = {}
            if name not in in_place:
                kind, *others = kinds[id(parameter)]
                own = self.method.group_at(name, "" if others else kind)
            key = tuple(sorted(own.items()))
            group = groups.setdefault(
                key,
                {
                    "params": [],
                    "lr": own.get("lr", lr * own.get("lr_scale", 1.0)),
                    "weight_decay": own.get("weight_decay", weight_decay),
                    "names": [],
                    "own": own,
                },
            )
            group["params"].append(parameter)
            group["names"].append(name)
        return list(groups.values())

    @property
    def rules(self) -> list[Rule]:
        """The method's rules, made once for this handle."""
        if self._rules is None:
            self._rules = self.method.rules()
        return self._rules

    def run(self, total_steps: int, *, seed: int = 0, optimizer: torch.optim.Optimizer | None = None) -> Rules:
        """The rules of a training run in a plain loop.

        Call `emit("attached")` once, then `step(lambda: loss)` for every step, and `emit("finished")`. A loop that
        accumulates gradients makes the step itself: `emit("step_begin")`, `emit("gradients")` when they are complete
        and before they are clipped, `emit("step_end")` after the update; it adds `penalty()` to every loss.
        """
        return Rules(self.rules, Run(self, optimizer, 0, total_steps, seed))

    def tensors(self) -> dict[str, Tensor]:
        """What a file keeps of this adapter, by full name."""
        kept: dict[str, Tensor] = {}
        for name, part in self.named_parts():
            if isinstance(part, Trained):
                full = _join(part.site.path, part.site.parameter or "weight")
                kept[full] = part.learned if part.learned is not None else self.model.get_parameter(full).detach()
            else:
                kept.update({f"{name}.{inner}": value for inner, value in part.tensors().items()})
        for key, module in self.shared.items():
            kept.update({f"shared.{key}.{inner}": value for inner, value in module.state_dict().items()})
        return kept

    def summary(self) -> Summary:
        """Sites, shapes, trainable sizes, share, saved bytes."""
        rows = []
        for name, part in self.named_parts():
            path, label = name.rpartition(".")[::2]
            if isinstance(part, Trained):
                parameter = self.model.get_parameter(_join(part.site.path, part.site.parameter or "weight"))
                shapes, count = "x".join(map(str, parameter.shape)), parameter.numel()
                count = count if parameter.requires_grad else 0
                stored = parameter.numel() * parameter.element_size()
            else:
                tensors = part.tensors()
                shapes = " ".join(f"{n} {'x'.join(map(str, t.shape))}" for n, t in tensors.items())
                count = sum(p.numel() for p in part.parameters() if p.requires_grad)
                stored = sum(t.numel() * t.element_size() for t in tensors.values())
            rows.append(Row(path, label, type(part).__name__, shapes, count, stored))
        return Summary(
            self.name,
            self.method.slug,
            rows,
            sum(parameter.numel() for parameter in self.parameters()),
            base_size(self.model),
            sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values()),
        )

    def __repr__(self) -> str:
        return f"Tuned({type(self.model).__name__}, {self.name!r}, {self.method!r})"


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def base_size(model: nn.Module) -> int:
    """Number of parameters of the base, those of adapters left out; packed 4-bit weights count as values."""
    total, seen = 0, set()
    for name, parameter in model.named_parameters():
        if "deltaworks" in name.split(".") or id(parameter) in seen:
            continue
        seen.add(id(parameter))
        quantised = getattr(parameter, "quant_state", None)
        total += quantised.shape.numel() if quantised is not None else parameter.numel()
    return total
