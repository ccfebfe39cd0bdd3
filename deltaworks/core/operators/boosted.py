"""Several copies of one part that share its tensors, each under fixed random masks of its own, added up.

What the part is decides the form of its copies, never which method made it. A product of two factors stays one, of
`copies` times the rank. Any other additive delta is built as a matrix. What changes activations by `added(y, r)`, that
is `y` and what it adds to it reading `r`, adds for one copy after the other at the one place that it has.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..experts import PerExpert
from ..method import experts_of
from ..part import PARTS, Delta, Module, Part, Trained, Wrapper
from .boosted_prefix import boosted_prefix
from .low_rank import Factored, LowRank, dropped
from .made import Made
from .masks import Masks, masks_of
from .prefix import EncodedPrefix
from .row_dropout import RowDropout

if TYPE_CHECKING:
    from ...model.weights import Weight


def has_matrices(part: Part, weight: Weight) -> bool:
    """Whether a part has matrices to mask, unlike a tap, or the shift of a norm."""
    if isinstance(part, Delta):
        return len(weight.shape) > 1
    return isinstance(part, Trained) or any(parameter.requires_grad for parameter in part.parameters())


def masked_copies(part: Part, weight: Weight, masks: Masks, *, fixed: bool, exact: bool) -> Part:
    """Masked copies of a part; of a stack, the stack of those of each.

    Args:
        part: what is copied.
        weight: what it changes, if it is a delta.
        masks: copies, density, pattern and seed.
        fixed: whether its matrix is all that a delta does.
        exact: whether a delta adds nothing at the start.

    Raises:
        ValueError: when copies of it cannot be added up, or would start from something else.
    """
    if isinstance(part, PerExpert):
        each = zip(part.each(), experts_of(weight), strict=True)
        stack: list[Any] = [masked_copies(one, own, masks, fixed=fixed, exact=exact) for one, own in each]
        return PerExpert(stack)
    if isinstance(part, EncodedPrefix):
        return boosted_prefix(part, masks)
    form = form_of(part)
    if form is None or (isinstance(part, Delta) and not fixed):
        kind = type(part).__name__
        raise ValueError(f"masked copies of {kind} do not add up; take such as lora, vera, houlsby or parallel_adapter")
    if isinstance(part, RowDropout) and (part.row_dropout or part.module_dropout):
        raise ValueError("row_dropout and module_dropout do not act on masked copies; leave them out")
    if isinstance(part, Delta):
        part.settle(weight)
        # Pages mix precisions, of which `attach` will make one.
        kinds = {tensor.dtype for tensor in (*part.parameters(), *part.buffers()) if tensor.is_floating_point()}
        if len(kinds) > 1:
            part.to(functools.reduce(torch.promote_types, kinds))
    made = form(part, *masks)
    valued = not any(tensor.is_meta for tensor in made.parameters())
    if exact and valued and isinstance(made, Delta) and bool(made.dense().detach().any()):
        raise ValueError("it starts from part of the weight, which masks would cut; take such as lora")
    return made


def form_of(part: Part) -> type[Copies] | None:
    """What masked copies of a part are; None where they cannot be added up."""
    if isinstance(part, Delta):
        product = isinstance(part, Factored) and type(part).dense in (Factored.dense, LowRank.dense)
        # Factors that are made may be as wide as the layer and have its full rank: masks would be as large.
        form = Boosted if product and not isinstance(part, Made) else BoostedMatrix
        return form if part.additive else None
    if not hasattr(part, "added"):
        return None
    return BoostedModule if isinstance(part, Module) else BoostedWrapper if isinstance(part, Wrapper) else None


class Copies(Part):
    """Masked copies of a part: the part's tensors under the part's names, and masks that are never stored.

    Args:
        part: what is copied.
        copies: d, number of masked copies.
        density: share of the entries a mask keeps.
        pattern: "equal" for exactly that share anywhere, "nm" for 2 of every 4 neighbours.
        seed: of the masks, which are drawn anew for every tensor and copy.
    """

    settings: ClassVar[tuple[str, ...]] = ("kind", "inner", "copies", "density", "pattern", "seed")
    prototype: Any

    def __init__(self, part: Part, copies: int, density: float, pattern: str, seed: int) -> None:
        super().__init__()
        self.kind, self.inner = type(part).__name__, part.configuration()
        self.copies, self.density, self.pattern, self.seed = copies, density, pattern, seed
        lent = {name: part.get_submodule(name) for name in part.borrowed}
        # Kept out of the module tree: its own tensors are only placeholders. What it borrows is the very module, which
        # may hold more than tensors.
        prototype = copy.deepcopy(part, {id(module): module for module in lent.values()})
        prototype._modules.update(dict.fromkeys(lent))
        prototype.to("meta")._modules.update(lent)
        self.__dict__.update(prototype=prototype, borrowed=part.borrowed, mergeable=part.mergeable)
        for name, module in lent.items():
            self.add_module(name, module)
        for name, value in part._buffers.items():
            if value is None:
                self.register_buffer(name, None, persistent=False)
        stored = part.state_dict()
        for name, value in (*part.named_parameters(), *part.named_buffers()):
            if not name.startswith(self._lent):
                self._hold(name, value, name in stored)

    @classmethod
    def remade(cls, settings: dict[str, Any], tensors: dict[str, Tensor], shared: dict[str, nn.Module]) -> Part:
        kind, inner = settings.get("kind"), settings.get("inner")
        known = PARTS.get(kind) if isinstance(kind, str) else None
        if known is None or issubclass(known, Copies) or not isinstance(inner, dict):
            raise ValueError(f"masked copies of {kind!r} are not known")
        part = known.remade(inner, tensors, shared)
        if form_of(part) is not cls:
            raise ValueError(f"masked copies of {kind!r} are no {cls.__name__}")
        return cls(part, **{name: settings[name] for name in ("copies", "density", "pattern", "seed")})

    def stop_dropping(self) -> None:
        super().stop_dropping()
        self.prototype.stop_dropping()  # which copies of modules act through

    @property
    def _lent(self) -> tuple[str, ...]:
        return tuple(f"{name}." for name in self.borrowed)

    def _hold(self, name: str, value: Tensor, persistent: bool) -> None:
        """Register a tensor under a name of the part, whose submodules are bare containers here."""
        owner: nn.Module = self
        *path, leaf = name.split(".")
        for piece in path:
            if piece not in owner._modules:
                owner.add_module(piece, nn.Module())
            owner = owner.get_submodule(piece)
        if isinstance(value, nn.Parameter):
            owner.register_parameter(leaf, nn.Parameter(value.detach(), requires_grad=value.requires_grad))
        else:
            owner.register_buffer(leaf, value, persistent=persistent)

    def _mask(self, name: str, like: Tensor) -> None:
        """Draw the masks of a tensor, `copies` of its shape."""
        masks = masks_of(name, like.shape, (self.copies, self.density, self.pattern, self.seed))
        self._hold(f"{name}_masks", masks.to(like.device), persistent=False)

    def _call(self, what: str, *given: Any, number: int | None = None) -> Any:
        """What a method of the part gives: of one copy's masked tensors, or without a number of the tensors whole."""
        if self.prototype.training is not self.training:  # which is set module by module, too, and it is in no tree
            self.prototype.train(self.training)
        held = dict([*self.named_parameters(), *self.named_buffers()])
        tensors = {}
        for name, value in held.items():
            if not name.startswith(self._lent) and not name.endswith("_masks"):
                masks = None if number is None else held.get(f"{name}_masks")
                tensors[f"part.{name}"] = value if masks is None else value * masks[number]
        return functional_call(_Method(self.prototype, what), tensors, given)


class Boosted(Copies, Factored):
    """`dW = scale * sum_i (M_i^B * B)(M_i^A * A)`.

    Both factors are masked as the matrices they are: whether they train or are frozen, are the layer's own or lent by
    a bank, are stored whole or packed. Masks take a byte for every entry and copy.
    """

    a_masks: Tensor
    b_masks: Tensor

    def __init__(self, part: Factored, copies: int, density: float, pattern: str, seed: int) -> None:
        super().__init__(part, copies, density, pattern, seed)
        self.scale, self.dropout, self.train_a = part.scale, part.dropout, part.train_a
        with torch.no_grad():
            for name, factor in zip("ab", part.factors(), strict=True):
                self._mask(name, factor)

    @property
    def rank(self) -> int:
        return self.copies * self.a_masks.shape[-2]

    def factors(self) -> tuple[Tensor, Tensor]:
        a, b = self._call("factors")
        return torch.cat((a * self.a_masks).unbind(0)), torch.cat((b * self.b_masks).unbind(0), dim=1)


class BoostedMatrix(Copies, Delta):
    """`dW = sum_i dW(M_i * theta)`, theta what trains of any additive delta.

    What is frozen stays whole: random matrices that all layers borrow, or vectors that `settle` finds in the weight.
    They are as wide as layers, and masks of their own for every layer and copy would undo that they take no memory. So
    the rank rises where trained tensors limit it, and not above that of such constants.

    Attributes:
        dropout: the delta's, on the input of all copies at once.
    """

    def __init__(self, part: Delta, copies: int, density: float, pattern: str, seed: int) -> None:
        super().__init__(part, copies, density, pattern, seed)
        self.dropout = float(getattr(part, "dropout", 0.0))
        self.__dict__["lean"] = bool(self.dropout)  # the input is needed for dropout alone
        for name, value in part.named_parameters():
            if not name.startswith(self._lent) and value.requires_grad and value.numel() > 1:
                self._mask(name, value)

    def dense(self) -> Tensor:
        return torch.stack([self._call("dense", number=i) for i in range(self.copies)]).sum(0)

    def prefers_side(self, tokens: int, weight: Weight) -> bool:
        return bool(self.dropout and self.training)

    def side(self, x: Tensor) -> Tensor:
        return super().side(dropped(self, x))

    def settle(self, weight: Weight) -> None:
        if type(self.prototype).settle is Delta.settle:
            return
        lent = {name: self.get_submodule(name) for name in self.borrowed}
        part = PARTS[self.kind].remade(self.inner, self.tensors(), lent)
        assert isinstance(part, Delta)
        stored = set(part.state_dict())
        part._buffers.update({name: value for name, value in self._buffers.items() if name in part._buffers})
        part.settle(weight)
        for name, value in part._buffers.items():
            if name not in stored:
                self.register_buffer(name, value, persistent=False)


class Summed(Copies):
    """What `added` adds for all copies together: matrices are masked, biases and trained scales are not."""

    def __init__(self, part: Part, copies: int, density: float, pattern: str, seed: int) -> None:
        super().__init__(part, copies, density, pattern, seed)
        for name, value in part.named_parameters():
            if not name.startswith(self._lent) and value.dim() > 1:
                self._mask(name, value)
        # The part knows where its change is added, and calls this there instead of its own.
        self.prototype.__dict__["added"] = self.added

    def added(self, y: Tensor, r: Tensor) -> Tensor:
        """`y` and what every copy adds to it, reading `r`."""
        for i in range(self.copies):
            y = self._call("added", y, r, number=i)
        return y


class BoostedModule(Summed, Module):
    """Copies at a module's input or output."""

    def input(self, x: Tensor) -> Tensor:
        return self.prototype.input(x)

    def output(self, y: Tensor, x: Tensor) -> Tensor:
        return self.prototype.output(y, x)


class BoostedWrapper(Summed, Wrapper):
    """Copies around a module's call."""

    def within(self, layer: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self.prototype.within(layer, call, *args, **kwargs)


class _Method(nn.Module):
    """A method of a part's class as a call, so that the part's tensors can be swapped for others while it runs."""

    def __init__(self, part: Part, what: str) -> None:
        super().__init__()
        self.part, self.what = part, what

    def forward(self, *given: Any) -> Any:
        return getattr(type(self.part), self.what)(self.part, *given)
