"""How a change enters an attention: between its projections, rotary embedding and cache, and its output projection.

transformers' attention modules look up the function that computes attention under a name in their configuration. While
such a module is called, its `config` is a view that answers with our name; our function then lets the parts act and
calls the function that the model would have called. Nothing outlives the call: the model's configuration, and with it
the masks it builds, stay those of the base, whatever is switched, copied or removed meanwhile.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from .part import Part

NAME = "deltaworks"
Attended = tuple[Tensor, Tensor | None]
"""Output, `batch x queries x heads x head size`, and attention weights where the function gives them."""


@dataclass(frozen=True)
class AttentionCall:
    """What an attention function is called with.

    Attributes:
        module: the attention module.
        implementation: name of the function that the model would use ("eager", "sdpa", "flash_attention_2", ...).
        query: `batch x heads x queries x head size`, rotated.
        key, value: `batch x key heads x keys x head size`, those of the cache included.
        mask: as the model built it for this implementation; None where nothing needs to be hidden, or where the
            implementation hides later tokens by itself.
        options: everything else: scaling, dropout, position_bias, ...
    """

    module: nn.Module
    implementation: str
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    options: dict[str, Any]

    @property
    def causal(self) -> bool:
        """Whether queries must not see later keys."""
        said = self.options.get("is_causal")
        return bool(getattr(self.module, "is_causal", True) if said is None else said)

    def preceded_by(self, key: Tensor, value: Tensor) -> AttentionCall:
        """The same call with keys and values in front that every query sees, without any position.

        Args:
            key, value: `key heads x number x head size`, or with a leading batch axis.

        Raises:
            ValueError: where the implementation has no way to do so.
        """
        if "flex" in self.implementation or (self.mask is not None and not isinstance(self.mask, Tensor)):
            raise ValueError(
                f"a prefix cannot enter {self.implementation} attention, whose masks are compiled; "
                "load the base with attn_implementation='sdpa'"
            )
        if self.key.shape[1] != key.shape[-3] or self.key.shape[-1] != key.shape[-1]:
            raise ValueError(
                f"{type(self.module).__name__} has keys of {self.key.shape[1]} heads x {self.key.shape[-1]}, "
                f"the prefix {key.shape[-3]} x {key.shape[-1]}; it was made for another base"
            )
        if self.value.shape[-1] != value.shape[-1]:
            raise ValueError(
                f"{type(self.module).__name__} has values of another size ({self.value.shape[-1]}) than its keys "
                f"({self.key.shape[-1]}), for which there is no prefix"
            )
        batch, number = self.key.shape[0], key.shape[-2]
        old_key, old_value, mask = self.key, self.value, self.mask
        options = dict(self.options)
        if mask is None and self.implementation == "sdpa" and self.causal and (queries := self.query.shape[2]) > 1:
            # Left without a mask, sdpa lines up the first query with the first key, which is no longer its own.
            old_key, old_value = old_key[:, :, :queries], old_value[:, :, :queries]
            mask = torch.ones(queries, queries, dtype=torch.bool, device=old_key.device).tril()[None, None]
        if "flash" in self.implementation:
            self._check_flash()
        if mask is not None:
            mask = F.pad(mask, (number, 0), value=1 if mask.dim() == 2 or mask.dtype == torch.bool else 0)
        if options.get("position_bias") is not None:
            options["position_bias"] = F.pad(options["position_bias"], (number, 0))
        return dataclasses.replace(
            self,
            key=torch.cat((key.to(old_key.dtype).expand(batch, -1, -1, -1), old_key), 2),
            value=torch.cat((value.to(old_value.dtype).expand(batch, -1, -1, -1), old_value), 2),
            mask=mask,
            options=options,
        )

    def _check_flash(self) -> None:
        if self.options.get("cu_seq_lens_q") is not None:
            raise ValueError(
                "a prefix cannot enter packed sequences under flash attention; "
                "load the base with attn_implementation='sdpa', or do not pack"
            )
        if self.options.get("sliding_window") is not None:
            raise ValueError(
                "under flash attention a sliding window would hide the prefix; "
                "load the base with attn_implementation='sdpa'"
            )


Compute = Callable[[AttentionCall], Attended]


class Attending(Part):
    """A change of what an attention computes: keys and values added, terms added to its output."""

    def attend(self, call: AttentionCall, compute: Compute) -> Attended:
        """What the attention gives instead of `compute(call)`."""
        raise NotImplementedError


class _View:
    """An attention module's configuration, but for the name of its attention function."""

    _attn_implementation = NAME

    def __init__(self, config: Any, parts: Sequence[Attending]) -> None:
        self.config, self.parts, self.read = config, parts, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.config, name)


def attended(layer: nn.Module, parts: Sequence[Attending], call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The call of an attention module with parts acting inside.

    Raises:
        ValueError: when the module does not look up its attention function, so that nothing would have changed.
    """
    config: Any = getattr(layer, "config", None)
    view = _View(config, parts)
    if config is not None:
        layer.config = view  # type: ignore[assignment]
    try:
        result = call(*args, **kwargs)
    finally:
        if config is not None:
            layer.config = config
    if not view.read:
        raise ValueError(
            f"{type(layer).__name__} computes attention by itself, not through transformers' attention functions, so "
            "nothing can be added inside; take a method that changes weights or activations, such as lora"
        )
    return result


def _function(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> Attended:
    view: Any = module.config
    if not isinstance(view, _View):
        raise ValueError(f"the attention function {NAME!r} is not for models to choose; give 'sdpa' or 'eager'")
    view.read = True
    compute: Compute = _original
    for part in view.parts:
        compute = functools.partial(part.attend, compute=compute)
    implementation = view.config._attn_implementation or "eager"
    return compute(AttentionCall(module, implementation, query, key, value, attention_mask, options))


def _original(call: AttentionCall) -> Attended:
    """What the base computes."""
    # Every model file has an eager function of its own, which the registry does not know.
    own = inspect.unwrap(type(call.module).forward).__globals__.get("eager_attention_forward")
    function = ALL_ATTENTION_FUNCTIONS.get_interface(call.implementation, own)  # type: ignore[arg-type]
    return function(call.module, call.query, call.key, call.value, call.mask, **call.options)


AttentionInterface.register(NAME, _function)
