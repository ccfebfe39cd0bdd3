"""A soft mixture of learned scalings of an activation, weighted by a router that reads the activation itself."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from ..init import normal, ones
from ..part import Module
from .recompute import recomputed


class VectorMixture(Module):
    """`v * sum_e p_e l_e`, `p = softmax(v G)`, per head; on some rows of a fused output where the site has rows.

    Args:
        width: of the activation.
        heads: in how many equal parts it is routed, each by itself with the same G.
        experts: number of vectors E.
        at_input: whether it scales what the module reads instead of what it gives.
    """

    settings: ClassVar[tuple[str, ...]] = ("width", "heads", "experts", "at_input")

    def __init__(self, width: int, heads: int, experts: int, at_input: bool = False) -> None:
        super().__init__()
        self.width, self.heads, self.experts, self.at_input = width, heads, experts, at_input
        self.l = nn.Parameter(ones(heads, experts, width // heads))
        self.router = nn.Parameter(normal(width // heads, experts, std=0.02))

    def input(self, x: Tensor) -> Tensor:
        return recomputed(self._scaled, x, self.l, self.router) if self.at_input else x

    def output(self, y: Tensor, x: Tensor) -> Tensor:
        if self.at_input:
            return y
        if self.site.rows is None:
            return recomputed(self._scaled, y, self.l, self.router)
        rows = self._rows(y.device)
        return y.index_copy(-1, rows, recomputed(self._scaled, y.index_select(-1, rows), self.l, self.router))

    def _rows(self, device: torch.device) -> Tensor:
        kept = self.__dict__.get("_index")
        if kept is None or kept.device != device:
            with torch.inference_mode(False):
                kept = self.__dict__["_index"] = torch.tensor(self.site.rows, device=device)
        return kept

    def _scaled(self, v: Tensor, l: Tensor, router: Tensor) -> Tensor:
        parts = v.unflatten(-1, (self.heads, -1))
        # The router decides in float32 whatever the model computes in, as the official code does.
        wide = torch.promote_types(v.dtype, torch.float32)
        p = torch.softmax(parts.to(wide) @ router.to(wide), dim=-1).to(v.dtype)
        return (parts * torch.einsum("...he,hed->...hd", p, l.to(v.dtype))).flatten(-2)
