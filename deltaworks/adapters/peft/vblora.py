"""VB-LoRA: PEFT's `VBLORA`, with all logits or with what they chose (`save_only_topk_weights`)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...core.operators.bank import BankFactors, ChosenFactors, VectorBank
from ...core.part import Part
from ..reading import Plan
from .draft import Draft
from .source import Source, refuse
from .targets import named

KIND = "VBLORA"


def fits(part: Part) -> bool:
    """Whether a part is VB-LoRA's."""
    return isinstance(part, (BankFactors, ChosenFactors))


def read(source: Source) -> Plan:
    """A `VBLORA` folder as an adapter."""
    rank, vectors, length = source.whole("r", 4), source.whole("num_vectors", 256), source.whole("vector_length", 256)
    top, dropout = source.whole("topk", 2), source.number("vblora_dropout", 0.0)
    chosen = source.flag("save_only_topk_weights")
    source.flag("fan_in_fan_out")
    source.number("init_vector_bank_bound", 0.02)
    source.number("init_logits_std", 0.1)
    targets = source.targets()
    method = source.made(
        "vb_lora",
        on=source.on,
        rank=rank,
        vectors=vectors,
        length=length,
        top=top,
        dropout=dropout,
        keep_logits=not chosen,
    )
    values = source.tensor("vblora_vector_bank")
    if values.shape != (vectors, length):
        refuse(source.weights, f"vblora_vector_bank has shape {list(values.shape)}, not {[vectors, length]}")
    bank = VectorBank(vectors, length)
    bank.vectors.data = values.clone()
    for path in targets:
        weight = source.weight(path, nn.Linear, Conv1D)
        pieces = {"a": (rank, weight.fan_in // length), "b": (weight.fan_out // length, rank)}
        held: dict[str, Tensor] = {}
        for factor, shape in pieces.items():
            name = f"{path}.vblora_logits_{factor.upper()}"
            if chosen:
                held[f"{factor}_index"] = source.tensors.pop(f"{name}_topk_indices", values.new_zeros(0)).clone()
                held[f"{factor}_weights"] = source.tensor(f"{name}_topk_weights").clone()
                wanted = {f"{factor}_index": (*shape, top), f"{factor}_weights": (*shape, top - 1)}
            else:
                held[factor], wanted = source.tensor(name).clone(), {factor: (*shape, vectors)}
            for key, size in wanted.items():
                if held[key].shape != size or held[key].is_floating_point() == key.endswith("_index"):
                    refuse(source.weights, f"{name} holds {key} of shape {list(held[key].shape)}, not {list(size)}")
        try:
            made = ChosenFactors(**held, bank=bank, length=length) if chosen else None
        except ValueError as error:
            refuse(source.weights, f"{path}: {error}")
        part = made or BankFactors(**held, bank=bank, length=length, top=top, dropout=dropout)
        source.place(path, "weight", part)
    source.biases(targets, "vblora_only")
    return source.plan(method, {"bank": bank})


def write(draft: Draft) -> dict[str, Any]:
    """A VB-LoRA adapter as a `VBLORA` configuration."""
    bank, method = draft.shared["bank"], draft.method
    assert isinstance(bank, VectorBank)
    chosen = isinstance(draft.parts[0], ChosenFactors)
    for part in draft.parts:
        assert isinstance(part, (BankFactors, ChosenFactors))
        where = f"{draft.prefix}{draft.layer(part, nn.Linear, Conv1D)}.vblora_logits_"
        if part.length != bank.length or isinstance(part, ChosenFactors) != chosen:
            raise draft.refuse(
                part.site.path, f"PEFT's pieces are all of the bank's {bank.length} values and of one form"
            )
        for factor in "ab":
            if chosen:
                draft.tensors[f"{where}{factor.upper()}_topk_indices"] = part.get_buffer(f"{factor}_index")
                draft.tensors[f"{where}{factor.upper()}_topk_weights"] = part.get_buffer(f"{factor}_weights")
            else:
                draft.tensors[f"{where}{factor.upper()}"] = part.get_parameter(factor).detach()
    targets = [part.site.path for part in draft.parts]
    draft.tensors["base_model.vblora_vector_bank"] = bank.vectors.detach()
    settings: Any = method
    return draft.config(
        KIND,
        r=settings.rank,
        num_vectors=bank.count,
        vector_length=bank.length,
        topk=settings.top,
        target_modules=named(draft.model, targets),
        save_only_topk_weights=chosen,
        vblora_dropout=settings.dropout,
        fan_in_fan_out=draft.conv1d(targets),
        bias=draft.biases(targets, "vblora_only"),
        modules_to_save=draft.saved(),
    )
