"""A PEFT folder being written: configuration keys and tensors are collected, and every part must find its place."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ...core.method import weight_at
from ...core.operators.offset import Offset
from ...core.part import Delta, Part, Trained
from ...core.tuned import Tuned
from ...model.anatomy import describe
from ..native import base_name, learned
from .targets import adapts, modules

TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
# PEFT's classes for these tasks expect the head in the file.
HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}


class Draft:
    """What is written of one adapter.

    Attributes:
        parts: the adapter's parts that change the call, in order; parameters trained in place are apart.
        tensors: what the weights file will hold, by PEFT's names.
    """

    prefix = "base_model.model."

    def __init__(self, handle: Tuned) -> None:
        self.model, self.method = handle.model, handle.method
        self.shared = handle.shared
        self.base = describe(handle.model)
        everything = list(handle.parts())
        self.values = {_place(part): self._value(part) for part in everything if self._is_value(part)}
        self.parts = [part for part in everything if not self._is_value(part)]
        self.tensors: dict[str, Tensor] = {}

    def refuse(self, what: str, why: str) -> ValueError:
        """The error for something that PEFT's format has no words for."""
        return ValueError(f"{self.method.slug} cannot be written in PEFT's format: {what}: {why}")

    def layer(self, part: Part, *kinds: type[nn.Module], any_convolution: bool = False) -> str:
        """The path of a part that changes the whole weight of a layer of one of these kinds, linear ones without."""
        if part.site.rows is not None or part.site.parameter != "weight":
            raise self.refuse(part.site.name, "PEFT adapts whole layers")
        layer = self.model.get_submodule(part.site.path)
        if not adapts(layer, kinds or (nn.Linear,), any_convolution=any_convolution):
            raise self.refuse(part.site.name, f"PEFT does not adapt {type(layer).__name__} so")
        return part.site.path

    def one(self, what: str, values: Iterable[Any]) -> Any:
        """The value that all layers have in common, as PEFT's format wants it."""
        found = list(dict.fromkeys(values))
        if len(found) > 1:
            raise self.refuse(what, f"PEFT has one for all layers, here are {', '.join(map(str, found[:4]))}")
        return found[0]

    def put(self, name: str, value: Tensor) -> None:
        """A tensor under its name in the model."""
        self.tensors[f"{self.prefix}{name}"] = value.detach()

    def task(self, always: bool = False) -> str | None:
        """PEFT's name for what the model does, None where its class for it would expect what we do not have.

        With `always`, as prompts need it, a head that is not trained is written as the base has it.
        """
        name = type(self.model).__name__
        task = next((task for end, task in TASKS.items() if name.endswith(end)), None)
        # PEFT's classes pass token ids on by position; sounds and pictures go through its plain one.
        if getattr(self.model, "main_input_name", "input_ids") != "input_ids":
            return None
        if task == "SEQ_2_SEQ_LM" and not self.base.is_encoder_decoder:
            return None
        for path, module in modules(self.model):
            if path.rpartition(".")[2] in HEADS.get(task or "", ()) and not self._under(path):
                if not always:
                    return None
                for inner, parameter in module.named_parameters():
                    owner, _, own = f"{path}.{inner}".rpartition(".")
                    self.values[owner, own] = parameter.detach()
        return task or ("FEATURE_EXTRACTION" if always else None)

    def _under(self, head: str) -> bool:
        return any(path == head or path.startswith(f"{head}.") for path, _ in self.values)

    def config(self, kind: str, **own: Any) -> dict[str, Any]:
        """The whole configuration of one PEFT type."""
        task = self.task()
        mapping = {"base_model_class": type(self.model).__name__, "parent_library": type(self.model).__module__}
        return {
            "peft_type": kind,
            "task_type": task,
            "auto_mapping": mapping if task is None else None,
            "base_model_name_or_path": base_name(self.model),
            "revision": None,
            "inference_mode": True,
            **own,
        }

    def biases(self, targets: list[str], only: str) -> str:
        """Write trained biases; what `bias` must say."""
        biases = [path for path, module in modules(self.model) if module._parameters.get("bias") is not None]
        trained = [path for path, parameter in self.values if parameter == "bias" and path in biases]
        whole = {path for path in trained if self._complete(path)}
        bare = {path for path in whole if set(self.model.get_submodule(path)._parameters) == {"bias"}}
        alone = [path for path in trained if path not in whole - bare]
        if set(trained) == set(biases) and alone:
            mode = "all"
        elif set(alone) - bare and set(alone) == set(targets) & set(biases):
            mode = only
        elif set(alone) <= bare:
            return "none"
        else:
            place = next(path for path in alone if path not in bare)
            raise self.refuse(f"the bias of {place}", f'PEFT trains all, or those of the adapted layers ("{only}")')
        for path in alone:
            self.put(f"{path}.base_layer.bias" if path in targets else f"{path}.bias", self.values.pop((path, "bias")))
        return mode

    def saved(self) -> list[str] | None:
        """Write modules that are trained as a whole; what `modules_to_save` must say."""
        paths = list(dict.fromkeys(path for path, _ in self.values))
        for path in paths:
            module = self.model.get_submodule(path)
            if not self._complete(path):
                missing = next(
                    name
                    for name, value in module._parameters.items()
                    if value is not None and (path, name) not in self.values
                )
                raise self.refuse(path, f"it is trained in part, without {missing}; PEFT saves whole modules")
            for other, where in modules(self.model):
                if other != path and other.endswith(path):
                    raise self.refuse(path, f"modules_to_save would also take {other}")
                if where is not module and {id(v) for v in where._parameters.values() if v is not None} & {
                    id(v) for v in module._parameters.values()
                }:
                    raise self.refuse(path, f"it is tied to {other}; PEFT would change one of them only")
            for name, value in module.state_dict().items():
                if "deltaworks" not in name.split("."):
                    own = self.values.get((path, name))
                    self.put(f"{path}.{name}", value if own is None else own)
        return paths or None

    def conv1d(self, paths: list[str]) -> bool:
        """Whether these layers store their weight transposed, as GPT-2's do (`fan_in_fan_out`)."""
        return {type(self.model.get_submodule(path)).__name__ for path in paths} == {"Conv1D"}

    def _complete(self, path: str) -> bool:
        own = self.model.get_submodule(path)
        return all((path, name) in self.values for name, value in own._parameters.items() if value is not None)

    def _is_value(self, part: Part) -> bool:
        return isinstance(part, Trained) or (isinstance(part, Offset) and part.site.rows is None)

    @torch.no_grad()
    def _value(self, part: Part) -> Tensor:
        if isinstance(part, Trained):
            return learned(self.model, part)
        assert isinstance(part, Delta)
        weight = weight_at(self.model, part.site)
        if weight.stored is None:
            raise self.refuse(f"{part.site.name}", "the base has no such parameter, and PEFT adds none")
        return weight.layout(part.fold(weight.matrix().clone()))


def _place(part: Part) -> tuple[str, str]:
    return part.site.path, part.site.parameter or "weight"


def number(value: float) -> int | float:
    """A float that is a whole number as one, as people write it."""
    return int(value) if float(value).is_integer() else value
