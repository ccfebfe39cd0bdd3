"""The MLP behind prefixes with masked copies of each of its linear maps, which share the weight and are added up.

`z = sum_i (M_i * W) x + b`. Copies of a linear map are one map, each entry of which counts as often as masks keep it;
that costs one product, whatever the number of copies, and the finished table is made as from any other MLP.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..part import Shared
from .masks import Masks, masks_of
from .prefix import EncodedPrefix, PrefixEncoder

SETTINGS = ("copies", "density", "pattern", "seed")


class MaskedLinear(nn.Linear):
    """`z = sum_i (M_i * W) x + b`.

    Args:
        fan_in, fan_out: widths.
        masks: the masks of the weight, `copies x out x in`.

    Attributes:
        times: how many masks keep an entry, `out x in`.
    """

    times: Tensor

    def __init__(self, fan_in: int, fan_out: int, masks: Tensor) -> None:
        super().__init__(fan_in, fan_out)
        self.register_buffer("times", masks.sum(0, dtype=torch.int16), persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight * self.times, self.bias)


class BoostedEncoder(PrefixEncoder):
    """The first half of the MLP, for each kind of attention with masks of its own.

    Args:
        number, length, width, hidden: see `PrefixEncoder`.
        copies, density, pattern, seed: of the masks, as `masks_of` takes them.
    """

    settings = (*PrefixEncoder.settings, *SETTINGS)

    def __init__(
        self,
        number: int,
        length: int,
        width: int,
        hidden: int,
        *,
        copies: int,
        density: float,
        pattern: str,
        seed: int,
    ) -> None:
        super().__init__(number, length, width, hidden)
        self.copies, self.density, self.pattern, self.seed = masks = (copies, density, pattern, seed)
        shape = torch.Size((hidden, width))
        self.down = nn.ModuleList(
            MaskedLinear(width, hidden, masks_of(f"down.{kind}.weight", shape, masks)) for kind in range(number)
        )


class BoostedPrefix(EncodedPrefix):
    """One layer's second half of the MLP.

    Args:
        kind, heads, size, hidden, dropout, encoder: see `EncodedPrefix`.
        copies, density, pattern, seed: of the masks, as `masks_of` takes them.
    """

    settings = (*EncodedPrefix.settings, *SETTINGS)

    def __init__(
        self,
        kind: int,
        heads: int,
        size: int,
        hidden: int,
        dropout: float,
        encoder: PrefixEncoder,
        *,
        copies: int,
        density: float,
        pattern: str,
        seed: int,
    ) -> None:
        super().__init__(kind, heads, size, hidden, dropout, encoder)
        self.copies, self.density, self.pattern, self.seed = masks = (copies, density, pattern, seed)
        shape = torch.Size((2 * heads * size, hidden))
        self.up = MaskedLinear(hidden, shape[0], masks_of("up.weight", shape, masks))


def boosted_encoder(module: Shared, masks: Masks) -> Shared:
    """The first half of a prefix MLP under masks; whatever else layers share, as it is."""
    if not isinstance(module, PrefixEncoder):
        return module
    return _filled(BoostedEncoder, module.configuration(), masks, module.state_dict())


def boosted_prefix(part: EncodedPrefix, masks: Masks) -> BoostedPrefix:
    """The second half of a prefix MLP under masks."""
    given = {**part.configuration(), "encoder": part.encoder}
    return _filled(BoostedPrefix, given, masks, part.tensors())


def _filled(form: Any, given: dict[str, Any], masks: Masks, tensors: dict[str, Tensor]) -> Any:
    with torch.device("meta"):  # draws no random number, so that what follows starts as without masks
        made = form(**given, **dict(zip(SETTINGS, masks, strict=True)))
    made.load_state_dict(tensors, strict=False, assign=True)
    return made
