"""Trained rows in front of the embedded text.

They enter where the model's own embeddings do: at the backbone, the module that takes `input_ids` or `inputs_embeds`
and runs the blocks. What is built on it, heads, losses, poolings, sees the rows of the text alone, so that nothing of
it needs to know.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import StaticLayer

from ...model.anatomy import Anatomy, Stack
from ..part import Module, Wrapper


class SoftPrompt(Wrapper):
    """Rows in front of a backbone's input; masks, positions, token types and caches grow along.

    Args:
        prompt: `length x width`, trained.
        causal: whether the backbone looks back only; positions then follow the mask, so that padding on the left
            does not come between prompt and text.
        inner: whether the backbone is the encoder of an encoder-decoder, whose decoder sees the prompt's rows too.
            Otherwise they are cut off the output.
        first: whether what is cut keeps the prompt's first row in place of the text's first.
    """

    settings = ("causal", "inner", "first")

    def __init__(self, prompt: Tensor, causal: bool, inner: bool = False, first: bool = False) -> None:
        super().__init__()
        self.prompt = nn.Parameter(prompt)
        self.causal, self.inner, self.first = causal, inner, first

    def rows(self) -> Tensor:
        """What is put in front, `length x width`."""
        return self.prompt

    def within(self, layer: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = named_arguments(layer, args, kwargs)
        ids, embedded = given.pop("input_ids", None), given.get("inputs_embeds")
        if embedded is None:
            embedded = layer.get_input_embeddings()(ids)  # type: ignore[operator]
        cache = given.get("past_key_values", given.get("cache_params"))
        if any(isinstance(held, StaticLayer) for held in getattr(cache, "layers", ())):
            raise ValueError("a static cache has no room for a prompt's rows; take the default cache")
        if filled(cache):
            # The prompt's keys and values are in the cache; only counts have to include it.
            rows = embedded.new_empty(0, embedded.shape[-1])
        else:
            rows = self.rows().to(embedded.dtype)
        length, number, width = self.rows().shape[0], rows.shape[0], embedded.shape[1]
        mask = extended_mask(given.get("attention_mask"), length, already=width + length if self.inner else None)
        if mask is not None:
            given["attention_mask"] = mask
        if "position_ids" in parameters_of(type(layer)):
            given["position_ids"] = self._positions(given.get("position_ids"), mask, length, number, width, given)
        if number and given.get("token_type_ids") is not None:
            types = given["token_type_ids"]
            given["token_type_ids"] = torch.cat((types.new_zeros(types.shape[0], number), types), 1)
        given["inputs_embeds"] = torch.cat((rows.expand(embedded.shape[0], -1, -1), embedded), 1)
        result = call(**given)
        return result if self.inner or not number else self._text_rows(result, number)

    def _positions(
        self, given: Tensor | None, mask: Tensor | None, length: int, number: int, width: int, others: dict[str, Any]
    ) -> Tensor | None:
        if given is None:
            if mask is None or not self.causal:
                return None
            return (mask.cumsum(-1) - 1).clamp(min=0)[:, -(number + width) :]
        packed = mask is None and width > 1 and bool((given[..., 1:] - given[..., :-1] != 1).any())
        if packed or others.get("cu_seq_lens_q") is not None or given.dim() != 2:
            raise ValueError(
                "a prompt stands in front of one text a row; give unpacked batches with an attention_mask of "
                f"batch x tokens, not position_ids of shape {list(given.shape)} that begin anew within a row"
            )
        front = torch.arange(number, device=given.device).expand(given.shape[0], -1)
        return torch.cat((front, given + length), 1)

    def _text_rows(self, result: Any, number: int) -> Any:
        def cut(y: Tensor) -> Tensor:
            # Contiguous, or the head's product would copy its weight for every row of the batch.
            text = y[:, number:].contiguous()
            return torch.cat((y[:, :1], text[:, 1:]), 1) if self.first else text

        if isinstance(result, Tensor):
            return cut(result)
        if isinstance(result, tuple):
            return (cut(result[0]), *result[1:])
        result["last_hidden_state"] = cut(result["last_hidden_state"])
        if result.get("hidden_states") is not None:
            result["hidden_states"] = tuple(y[:, number:] for y in result["hidden_states"])
        return result


class PromptedEncoder(Wrapper):
    """Lets the decoder of an encoder-decoder see the rows that a `SoftPrompt` has put in front of the encoder's text.

    Args:
        length: number of rows.
    """

    settings = ("length",)

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length

    def within(self, layer: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = named_arguments(layer, args, kwargs)
        states = given.get("encoder_outputs")
        already = None if states is None else states[0].shape[1]
        given["attention_mask"] = extended_mask(given.get("attention_mask"), self.length, already=already)
        return call(**given)


class TextRows(Module):
    """Takes a prompt's rows off what a pooler inside the backbone reads.

    Args:
        length: number of rows.
    """

    settings = ("length",)

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length

    def input(self, x: Tensor) -> Tensor:
        return x[:, self.length :]


def extended_mask(mask: Any, length: int, *, already: int | None = None) -> Tensor | None:
    """A padding mask (`batch x tokens`) with `length` more tokens in front that are seen.

    Args:
        mask: the mask, None when every token is seen.
        length: how many to add.
        already: a number of tokens that says that they have been added before.

    Raises:
        ValueError: for any other mask.
    """
    if mask is None or (isinstance(mask, Tensor) and mask.shape[-1] == already):
        return mask
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"a prompt needs an attention_mask of batch x tokens, not {shape}; take the default cache")
    return torch.cat((mask.new_ones(mask.shape[0], length), mask), 1)


@functools.cache
def parameters_of(kind: type[nn.Module]) -> tuple[str, ...]:
    """Names of the arguments of a module's forward."""
    return tuple(inspect.signature(kind.forward).parameters)[1:]


def named_arguments(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name."""
    return {**dict(zip(parameters_of(type(layer)), args, strict=False)), **kwargs}


def filled(cache: Any) -> bool:
    """Whether a cache holds anything yet."""
    if cache is None or not cache.layers:
        return False
    if all(cache.is_linear):
        return bool(cache.has_previous_state())
    return int(cache.get_seq_length()) > 0


def entrance(base: Anatomy, slug: str) -> tuple[str, Stack]:
    """Path of the module where text enters, and the stack it runs through; of an encoder-decoder the encoder's.

    Raises:
        ValueError: when no module takes both tokens and embeddings.
    """
    for stack in base.stacks:
        path = stack.path if stack.name == "encoder" or not base.is_encoder_decoder else ""
        while path:
            path = path.rpartition(".")[0]
            if {"input_ids", "inputs_embeds"} <= set(parameters_of(type(base.model.get_submodule(path)))):
                return path, stack
    raise ValueError(
        f"{slug} puts rows in front of embedded text, and nothing in {type(base.model).__name__} takes inputs_embeds; "
        "take prefix_tuning or lora"
    )
