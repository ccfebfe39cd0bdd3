"""A weight and a bias changed by terms of several kinds: `W' = W + W * A + B`, `b' = b + b * D + E + W C`.

Every term is "lora" (a product of two factors), "vector", "constant" or "none". A part that searches holds the tensors
of the largest kind of each term, draws a kind anew for every call in training until it is set to one; any other holds
the tensors of its kinds and no more.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from ...model.weights import Weight
from ..part import Delta
from .effective import Built

WEIGHT_TERMS = {"a": ("lora", "vector", "constant", "none"), "b": ("lora", "vector", "constant", "none")}
BIAS_TERMS = {"c": ("lora", "vector", "none"), "d": ("vector", "constant", "none"), "e": ("vector", "constant", "none")}


class Terms(Delta):
    """What both parts have in common: tensors `<term>d` (`out x rank`) and `<term>u` (`rank x in`), and a kind a term.

    Attributes:
        kinds: the kind of each term; of a part that searches, the one it is set to.
        searching: whether kinds are drawn in training, a term without tensors being none.
        fixed: whether a part that searches stands still where `configure` set it.
    """

    settings: ClassVar[tuple[str, ...]] = ("kinds", "searching", "fixed")
    choices: ClassVar[dict[str, tuple[str, ...]]] = {}

    def __init__(self, kinds: dict[str, str], searching: bool, fixed: bool, tensors: dict[str, Tensor | None]) -> None:
        super().__init__()
        if searching:  # hides the class's
            self.__dict__["choices"] = {
                term: some if tensors[f"{term}d"] is not None else ("none",) for term, some in self.choices.items()
            }
        self.configure(kinds)
        self.searching, self.fixed = searching, fixed
        for name, value in tensors.items():
            self.register_parameter(name, None if value is None else nn.Parameter(value))

    def configure(self, kinds: dict[str, str]) -> None:
        """Set the kinds of a part that searches; training keeps them too, until `fixed` is False again."""
        if (
            not isinstance(kinds, dict)
            or set(kinds) != set(self.choices)
            or any(kind not in self.choices[term] for term, kind in kinds.items())
        ):
            raise ValueError(f"terms {kinds} are not allowed; there is {self.choices}")
        self.kinds, self.fixed = dict(kinds), True

    def drawn(self) -> dict[str, str]:
        """The kinds for one call: drawn uniformly, each term by itself, while a part that searches trains."""
        if self.fixed or not (self.searching and self.training):
            return self.kinds
        return {term: kinds[int(torch.randint(len(kinds), ()))] for term, kinds in self.choices.items()}

    def term(self, name: str, kind: str) -> Tensor | float:
        """The matrix of a term, or what broadcasts to it."""
        down, up = getattr(self, f"{name}d", None), getattr(self, f"{name}u", None)
        if kind == "none" or down is None:
            return 0.0
        return _matrix(kind, down, up)

    def settled(self) -> Terms:
        """The same change by a part that holds no more than its kinds need."""
        kept: dict[str, Tensor | None] = {}
        for term, kind in self.kinds.items():
            down, up = getattr(self, f"{term}d"), getattr(self, f"{term}u", None)
            if kind == "lora" and up is not None:
                kept |= {f"{term}d": down.detach().clone(), f"{term}u": up.detach().clone()}
            elif kind != "none" and down is not None:
                kept[f"{term}d"] = (down[:, :1] if kind == "vector" else down[:1, :1]).detach().clone()
        settings = {**self.configuration(), "searching": False, "fixed": False}
        made = type(self)(**settings, **kept)  # type: ignore[arg-type]
        made.__dict__.update({name: self.__dict__[name] for name in ("bias",) if name in self.__dict__})
        return made


def _matrix(kind: str, down: Tensor, up: Tensor | None) -> Tensor:
    """A term from its tensors, or what broadcasts to it; a new tensor if it is "lora"."""
    if kind == "lora":
        assert up is not None
        return down @ up
    return down[:, :1] if kind == "vector" else down[:1, :1]


class WeightTerms(Terms, Built):
    """`W' = W + W * A + B`.

    Args:
        kinds: of a and b.
        searching, fixed: see `Terms`.
        ad, au, bd, bu: the tensors the kinds need: `out x rank` and `rank x in`, `out x 1`, or `1 x 1`.
    """

    choices = WEIGHT_TERMS
    additive = False

    def __init__(
        self,
        kinds: dict,
        searching: bool = False,
        ad: Tensor | None = None,
        au: Tensor | None = None,
        bd: Tensor | None = None,
        bu: Tensor | None = None,
        fixed: bool = False,
    ) -> None:
        super().__init__(kinds, searching, fixed, {"ad": ad, "au": au, "bd": bd, "bu": bu})
        # Backward folds again; what was drawn would be drawn anew. So a search builds the change in the open.
        self.__dict__["lean"] = searching

    def fold(self, weight: Tensor) -> Tensor:
        wide = torch.promote_types(weight.dtype, torch.float32)
        return (weight.to(wide) + self._change(weight.to(wide), self.kinds)).to(weight.dtype)

    def built(self, weight: Tensor) -> Tensor:
        made = None
        if self.kinds["a"] != "none":
            factor = _matrix(self.kinds["a"], *self._pair("a", weight.dtype))
            made = torch.addcmul(weight, weight, factor, out=factor if self.kinds["a"] == "lora" else None)
        made = weight.clone() if made is None else made
        if self.kinds["b"] == "none":
            return made
        down, up = self._pair("b", weight.dtype)
        if self.kinds["b"] == "lora" and up is not None:
            return made.addmm_(down, up)
        return made.add_(_matrix(self.kinds["b"], down, up))

    def pulled(self, weight: Tensor, change: Tensor) -> tuple[Tensor | None, ...]:
        found: dict[str, Tensor] = {}
        for name in ("b", "a"):  # the gradient of a is made in place of that of the weight
            sort = self.kinds[name]
            if sort == "none":
                continue
            slope = change if name == "b" else change.mul_(weight)
            down, up = self._pair(name, change.dtype)
            if sort == "lora":
                assert up is not None
                found[f"{name}d"], found[f"{name}u"] = slope @ up.T, down.T @ slope
            else:
                sums, whole = slope.sum(1, keepdim=True), torch.zeros_like(down)
                if sort == "vector":
                    whole[:, :1] = sums
                else:
                    whole[:1, :1] = sums.sum()
                found[f"{name}d"] = whole
        return tuple(
            found[name].to(tensor.dtype) if name in found else None
            for name, tensor in self._parameters.items()
            if tensor is not None and tensor.requires_grad
        )

    def _pair(self, name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        down, up = self._parameters[f"{name}d"], self._parameters.get(f"{name}u")
        assert down is not None
        return down.detach().to(dtype), None if up is None else up.detach().to(dtype)

    def act(self, x: Tensor, y: Tensor, weight: Weight) -> Tensor:
        matrix = weight.matrix()
        change = self._change(matrix.to(torch.promote_types(matrix.dtype, torch.float32)), self.drawn())
        return y + nn.functional.linear(x, change.to(x.dtype)).to(y.dtype)

    def _change(self, weight: Tensor, kinds: dict[str, str]) -> Tensor:
        return weight * self.term("a", kinds["a"]) + self.term("b", kinds["b"])


class BiasTerms(Terms):
    """`b' = b + b * D + E + W C`, added to a bias that may be missing.

    Args:
        fan_out: length of the bias.
        kinds: of c, d and e.
        searching, fixed: see `Terms`.
        cd, cu: `in x rank` and `rank x 1`, or `in x 1`.
        dd, ed: `out x 1`, or `1 x 1`.
    """

    settings: ClassVar[tuple[str, ...]] = ("fan_out", "kinds", "searching", "fixed")
    choices = BIAS_TERMS

    def __init__(
        self,
        fan_out: int,
        kinds: dict,
        searching: bool = False,
        cd: Tensor | None = None,
        cu: Tensor | None = None,
        dd: Tensor | None = None,
        ed: Tensor | None = None,
        fixed: bool = False,
    ) -> None:
        super().__init__(kinds, searching, fixed, {"cd": cd, "cu": cu, "dd": dd, "ed": ed})
        self.fan_out = fan_out

    def settle(self, weight: Weight) -> None:
        self.__dict__["bias"] = weight  # a view of the layer, whose weight C is multiplied by

    def dense(self) -> Tensor:
        kinds, bias = self.drawn(), self.__dict__.get("bias")
        value = torch.zeros(self.fan_out, 1) if bias is None else bias.matrix().unsqueeze(-1)
        wide = torch.promote_types(value.dtype, torch.float32)
        change = value.to(wide) * self.term("d", kinds["d"]) + self.term("e", kinds["e"])
        down, up = self._parameters["cd"], self._parameters["cu"]
        if kinds["c"] != "none" and down is not None and bias is not None:
            matrix = Weight(bias.layer, "weight", bias.rows).matrix()
            # A few columns at once cost less than one alone.
            lora = kinds["c"] == "lora" and up is not None
            product = (matrix @ (down if lora else down[:, :1]).to(matrix.dtype)).to(wide)
            change = change + (product @ up.to(wide) if lora and up is not None else product)
        return change.squeeze(-1)
