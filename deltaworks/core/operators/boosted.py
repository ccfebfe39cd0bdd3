"""Several copies of one delta that share its tensors, each under fixed random masks of its own."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..part import PARTS, Delta, Part
from .low_rank import Factored

PATTERNS = ("equal", "nm")


class Boosted(Factored):
    """`dW = sum_i dW(M_i * theta)`: a delta of `theta`, once for every set of masks M_i, added up.

    A low-rank delta stays one, of `copies` times the rank: its masked factors are stacked. Any other additive delta is
    built as a matrix. Masks are drawn from `seed`, for every copy and every trained tensor anew, and never stored.

    Args:
        delta: the additive delta; what it borrows is not masked.
        copies: d, number of masked copies.
        density: share of the entries a mask keeps.
        pattern: "equal" for exactly that share anywhere, "nm" for 2 of every 4 neighbours.
        seed: of the masks.
    """

    settings: ClassVar[tuple[str, ...]] = ("kind", "inner", "copies", "density", "pattern", "seed")
    prototype: Delta

    def __init__(self, delta: Delta, copies: int, density: float, pattern: str, seed: int) -> None:
        super().__init__()
        self.kind, self.inner = type(delta).__name__, delta.configuration()
        self.copies, self.density, self.pattern, self.seed = copies, density, pattern, seed
        # Kept out of the module tree: its tensors are only placeholders for the masked ones.
        self.__dict__["prototype"] = copy.deepcopy(delta).to("meta")
        self.__dict__.update(borrowed=delta.borrowed, lean=isinstance(delta, Factored))
        if isinstance(delta, Factored):
            self.scale, self.dropout, self.train_a = delta.scale, delta.dropout, delta.train_a
        for name in delta.borrowed:
            self.add_module(name, delta.get_submodule(name))
        lent = tuple(f"{name}." for name in delta.borrowed)
        generator = torch.Generator("cpu").manual_seed(seed)
        for name, value in delta.named_parameters():
            if not name.startswith(lent):
                self.register_parameter(name, nn.Parameter(value.detach(), requires_grad=value.requires_grad))
                if value.requires_grad:
                    masks = torch.stack([self._mask(value.shape, generator) for _ in range(copies)]).to(value.device)
                    self.register_buffer(f"{name}_masks", masks, persistent=False)
        for name, value in delta.named_buffers():
            if not name.startswith(lent):
                self.register_buffer(name, value, persistent=name in delta.state_dict())

    @classmethod
    def remade(cls, settings: dict[str, Any], tensors: dict[str, Tensor], shared: dict[str, nn.Module]) -> Part:
        kind, inner = settings.get("kind"), settings.get("inner")
        known = PARTS.get(kind) if isinstance(kind, str) else None
        if known is None or not issubclass(known, Delta) or known is cls or not isinstance(inner, dict):
            raise ValueError(f"masked copies of {kind!r} are not known")
        delta = known.remade(inner, tensors, shared)
        assert isinstance(delta, Delta)
        return cls(delta, **{name: settings[name] for name in ("copies", "density", "pattern", "seed")})

    def _mask(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        number = shape.numel()
        if self.pattern == "nm":
            if number % 4:
                raise ValueError(
                    f"a mask of 2 in 4 needs a multiple of 4 entries, a tensor of {list(shape)} has {number}"
                )
            order = torch.rand(number // 4, 4, generator=generator, device="cpu").argsort(dim=1)
            return (order < 2).view(shape)
        mask = torch.zeros(number, dtype=torch.bool, device="cpu")
        mask[torch.randperm(number, generator=generator, device="cpu")[: int(number * self.density)]] = True
        return mask.view(shape)

    def _masked(self, what: str) -> list[Any]:
        """What a method of the delta gives for every copy's tensors."""
        fixed = dict([*self.named_parameters(), *self.named_buffers()])
        masked = {name: value for name, value in fixed.items() if f"{name}_masks" in fixed}
        rest = {name: value for name, value in fixed.items() if name not in masked and not name.endswith("_masks")}
        made = []
        for i in range(self.copies):
            own = {name: value * fixed[f"{name}_masks"][i] for name, value in masked.items()}
            tensors = {f"delta.{name}": value for name, value in {**rest, **own}.items()}
            made.append(functional_call(_Call(self.prototype), tensors, (what,)))
        return made

    @property
    def rank(self) -> int:
        assert isinstance(self.prototype, Factored)
        return self.copies * self.prototype.rank

    def factors(self) -> tuple[Tensor, Tensor]:
        pairs = self._masked("factors")
        return torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs], dim=1)

    def dense(self) -> Tensor:
        return super().dense() if self.lean else torch.stack(self._masked("dense")).sum(0)


class _Call(nn.Module):
    def __init__(self, delta: Delta) -> None:
        super().__init__()
        self.delta = delta

    def forward(self, what: str) -> Any:
        return getattr(self.delta, what)()
