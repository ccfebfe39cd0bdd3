"""Soft prompts: PEFT's `PROMPT_TUNING`."""

from __future__ import annotations

from typing import Any

import torch

from ...core.operators.soft_prompt import PromptedEncoder, SoftPrompt, TextRows
from ...core.part import Part
from ..reading import Plan
from .draft import Draft
from .source import Source, refuse

KIND = "PROMPT_TUNING"
STARTS = ("prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs")
SIZES = ("num_attention_heads", "num_layers")


def fits(part: Part) -> bool:
    """Whether a part belongs to a soft prompt."""
    return type(part) is SoftPrompt or isinstance(part, (PromptedEncoder, TextRows))


def read(source: Source) -> Plan:
    """A `PROMPT_TUNING` folder as an adapter.

    PEFT's classifiers on encoders read the prompt's first row, those here do the same for such a file. Of the rows that
    PEFT keeps for an encoder-decoder only the encoder's act.
    """
    for key in (*STARTS, *SIZES):
        source.keys.pop(key, None)
    length, copies = source.whole("num_virtual_tokens", 0), source.take("num_transformer_submodules", 1, int)
    width = source.take("token_dim", None, int)
    table = source.tensor("prompt_embeddings")
    if table.dim() != 2 or table.shape[0] != length * copies or table.shape[1] != (width or table.shape[1]):
        wanted = [length * copies, width]
        refuse(source.weights, f"prompt_embeddings has shape {list(table.shape)}, {source.file.name} says {wanted}")
    reads_first = source.task == "SEQ_CLS" and not source.base.is_encoder_decoder and not source.base.causal
    readout = "prompt" if reads_first else "text"
    method = source.made("prompt_tuning", length=length, init="uniform", readout=readout)
    with torch.random.fork_rng(devices=[]):
        placed = list(method.parts(source.base, {}, None))
    for item in placed:
        if isinstance(item.part, SoftPrompt):
            if table.shape[1] != item.part.prompt.shape[1]:
                refuse(
                    source.weights, f"rows of width {table.shape[1]}, where the model has {item.part.prompt.shape[1]}"
                )
            item.part.prompt = torch.nn.Parameter(table[:length].clone())
    source.placed += placed
    return source.plan(method)


def write(draft: Draft) -> dict[str, Any]:
    """A soft prompt as a `PROMPT_TUNING` configuration."""
    prompt = next(part for part in draft.parts if isinstance(part, SoftPrompt))
    draft.prefix = "base_model."
    task = draft.task(always=True)
    if task == "SEQ_CLS" and not (prompt.first or prompt.causal or prompt.inner):
        raise draft.refuse("readout='text'", "PEFT's classifiers on encoders read the prompt's first row")
    draft.tensors["prompt_embeddings"] = prompt.prompt.detach()
    return draft.config(
        KIND,
        num_virtual_tokens=prompt.prompt.shape[0],
        token_dim=prompt.prompt.shape[1],
        num_transformer_submodules=1,
        num_attention_heads=draft.base.blocks[0].num_heads,
        num_layers=len(draft.base.stacks[0].blocks),
        prompt_tuning_init="RANDOM",
        prompt_tuning_init_text=None,
        tokenizer_name_or_path=None,
        modules_to_save=draft.saved(),
    ) | {"task_type": task, "auto_mapping": None}
