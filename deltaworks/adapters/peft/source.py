"""A PEFT folder being read: every key and every tensor is taken once, and what is left at the end is refused."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import regex
import torch
from torch import Tensor, nn

from ...core import registry
from ...core.method import Method, Placed, label
from ...core.part import Part, Shared, Trained
from ...model.anatomy import describe
from ...model.weights import Weight
from ..files import PEFT_CONFIG, PEFT_WEIGHTS, refuse
from ..reading import Plan
from ..sites import check_fit, find_site
from .targets import Targets, adapts, ends_in, ends_with, modules

ABOUT = (
    "peft_type", "peft_version", "task_type", "base_model_name_or_path", "revision", "auto_mapping", "inference_mode",
    "megatron_core", "ensure_weight_tying",
)  # fmt: skip
"""Keys that say something about the file and nothing about the function it describes."""
NEUTRAL: tuple[Any, ...] = (None, False, [], {}, "")


class Source:
    """The content of `adapter_config.json` and `adapter_model.safetensors`, for one model.

    Attributes:
        model: the model it is read for, only looked at.
        placed: the parts found so far.
    """

    def __init__(self, model: nn.Module, folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.model, self.base = model, describe(model)
        self.file, self.weights = folder / PEFT_CONFIG, folder / PEFT_WEIGHTS
        self.keys = {key: value for key, value in config.items() if key not in ABOUT}
        self.tensors = {_short(name): value for name, value in tensors.items()}
        self.placed: list[Placed] = []
        self.kind, self.task = str(config.get("peft_type")), config.get("task_type")
        self.saved = [name for name in self.names("modules_to_save") if isinstance(name, str)]
        self.endings = frozenset(self.saved)
        if len(self.tensors) < len(tensors):
            refuse(self.weights, "names a tensor twice, with and without its prefix")

    def take(self, key: str, default: Any, *kinds: type) -> Any:
        """A key's value, which must be of one of these types; `default` where the file does not say."""
        value = self.keys.pop(key, default)
        fits = any(type(value) is kind or (kind is float and type(value) is int) for kind in kinds)
        if value is default or (kinds and fits):
            return value
        wanted = " or ".join(kind.__name__ for kind in kinds)
        refuse(self.file, f"{key}={str(value)[:60]!r} is not allowed; it must be {wanted}")

    def names(self, key: str) -> list[Any]:
        """A key's value as a list, empty where it says nothing."""
        value = self.take(key, None, list, str)
        return [value] if isinstance(value, str) else value or []

    def forbid(self, key: str, why: str, *allowed: Any) -> None:
        """Refuse a key that changes the function in a way we have no method for."""
        value = self.keys.pop(key, None)
        if value not in NEUTRAL and value not in allowed:
            refuse(self.file, f"{key}={str(value)[:60]!r} cannot be expressed: {why}")

    def only_in_training(self, *keys: str) -> None:
        """Leave keys out that change nothing but training, saying so where they are set."""
        for key in keys:
            value = self.keys.pop(key, None)
            if value not in NEUTRAL and value != 0:
                told = f"{self.file}: {key}={str(value)[:60]} is left out; it acts in training only"
                warnings.warn(told, stacklevel=6)

    def weight(self, path: str, *kinds: type[nn.Module], any_convolution: bool = False) -> Weight:
        """The weight of a layer, which must be of a kind that this PEFT type adapts as we do: linear ones without."""
        layer = self.model.get_submodule(path)
        if not adapts(layer, kinds or (nn.Linear,), any_convolution=any_convolution):
            kind = type(layer).__name__
            refuse(self.file, f"target_modules: {path} is a {kind}, which {self.kind} does not adapt so")
        return Weight(layer, path=path)

    def shaped(self, name: str, *shape: int) -> Tensor:
        """A tensor by its name in the model, which must have this shape."""
        value = self.tensor(name)
        if tuple(value.shape) != shape:
            refuse(self.weights, f"{name} has shape {list(value.shape)}, where {self.file.name} says {list(shape)}")
        return value

    def targets(self) -> list[str]:
        """The modules that the configuration means.

        Where it does not say (an old file may leave it to PEFT's table), those that have tensors.
        """
        given = self.keys.pop("target_modules", None)
        listed = isinstance(given, list) and all(isinstance(name, str) for name in given)
        if given is not None and not isinstance(given, str) and not listed:
            refuse(self.file, f"target_modules={str(given)[:60]!r} is neither a list of names nor a regular expression")
        self.on = given or ALL
        layers = self.take("layers_to_transform", None, int, list)
        if isinstance(layers, list) and not all(type(index) is int for index in layers):
            refuse(self.file, f"layers_to_transform={str(layers)[:60]!r} must hold whole numbers")
        exclude = self.take("exclude_modules", None, str, list)
        pattern = self.take("layers_pattern", None, str, list)
        for names in (exclude, pattern):
            if isinstance(names, list) and not all(isinstance(name, str) for name in names):
                refuse(self.file, f"{str(names)[:60]!r} must hold names")
        try:
            chosen = Targets(given, exclude, layers, pattern, self.saved).chosen(self.model)
        except regex.error as error:
            refuse(self.file, f"a pattern that chooses modules is not a regular expression: {error}")
        if given is None:
            names = {name.rpartition(".")[0] for name in self.tensors}
            owners = (names | {name.rpartition(".")[0] for name in names}) - {""}
            chosen = [path for path, _ in modules(self.model) if path in owners and not ends_with(path, self.endings)]
        if given and not chosen:
            refuse(self.file, f"target_modules={str(given)[:60]!r} names no module of {type(self.model).__name__}")
        return chosen

    def has(self, name: str) -> bool:
        """Whether there is a tensor of this name that nothing has taken."""
        return name in self.tensors

    def tensor(self, name: str) -> Tensor:
        """A tensor by its name in the model; it must be there and of floating point."""
        value = self.tensors.pop(name, None)
        if value is None:
            refuse(self.weights, f"has no tensor {name!r}, which {self.file.name} announces")
        if not value.is_floating_point():
            refuse(self.weights, f"the tensor {name!r} has dtype {value.dtype}; it must be of floating point")
        return value

    def made(self, slug: str, **settings: Any) -> Method:
        """A method with these hyper-parameters, each checked by the method's own declaration."""
        try:
            return registry.find(slug)(**settings)
        except (ValueError, TypeError) as error:
            refuse(self.file, error)

    def place(self, path: str, parameter: str | None, part: Part, own_label: str | None = None) -> None:
        """Put a part at a site of the model, if it fits there."""
        try:
            site = find_site(self.base, path, parameter, None)
            check_fit(part, site, self.model)
        except (ValueError, RuntimeError, IndexError) as error:
            refuse(self.weights, error)
        self.placed.append(Placed(site, part, own_label or label(site)))

    def trained(self, path: str, parameter: str, value: Tensor) -> None:
        """Let a parameter of the base have another value."""
        part = Trained()
        part.learned = value
        self.place(path, parameter, part, f"trained_{parameter}")

    def plan(self, method: Method, shared: dict[str, Shared] | None = None) -> Plan:
        """The adapter, once everything the file holds has been accounted for."""
        self._saved_modules()
        self._saved_embeddings()
        rest = {key: value for key, value in self.keys.items() if value not in NEUTRAL}
        if rest:
            key, value = next(iter(rest.items()))
            refuse(self.file, f"{key}={str(value)[:60]!r} is not known for {self.kind} and cannot be left out")
        if self.tensors:
            refuse(
                self.weights,
                f"holds tensors that {self.file.name} does not announce: {', '.join(sorted(self.tensors)[:3])}",
            )
        return Plan(method, self.placed, shared or {})

    def biases(self, targets: list[str], only: str) -> None:
        """Trained biases: PEFT's `bias` is "none", "all" or `only` (those of the adapted layers)."""
        mode = self.take("bias", "none", str)
        if mode not in ("none", "all", only):
            refuse(self.file, f'bias={mode!r} is not allowed; it must be "none", "all" or "{only}"')
        for path, module in modules(self.model) if mode != "none" else ():
            if module._parameters.get("bias") is None or (mode == only and path not in targets):
                continue
            if ends_in(path, self.endings):
                continue  # saved as a whole, below
            inner = f"{path}.base_layer.bias"
            self.trained(path, "bias", self.tensor(inner if self.has(inner) else f"{path}.bias"))

    def _saved_modules(self) -> None:
        for path, module in modules(self.model) if self.saved else ():
            if not ends_in(path, self.endings):
                continue
            for name, value in module.state_dict().items():
                if "deltaworks" in name.split("."):
                    continue
                owner, _, own = f"{path}.{name}".rpartition(".")
                for extra in ("original_module", "modules_to_save"):  # PEFT writes copies beside it with bias="all"
                    self.tensors.pop(f"{path}.{extra}.{name}", None)
                new = self.tensor(f"{owner}.{own}")
                if own not in self.model.get_submodule(owner)._parameters:
                    if not torch.equal(new.to(value.dtype), value.cpu()):
                        refuse(
                            self.weights, f"modules_to_save changes the buffer {owner}.{own}, which is not a parameter"
                        )
                    continue
                self._refuse_tied(owner, own)
                self.trained(owner, own, new)

    def _refuse_tied(self, path: str, parameter: str) -> None:
        own = self.model.get_submodule(path)._parameters[parameter]
        for other, module in modules(self.model):
            if other != path and any(value is own for value in module._parameters.values() if value is not None):
                refuse(self.file, f"modules_to_save: {path}.{parameter} is tied to {other} and cannot change alone")

    def _saved_embeddings(self) -> None:
        """Embeddings that PEFT has saved beside the adapter, because they were adapted or resized."""
        at = dict(modules(self.model))
        for name in [name for name in self.tensors if regex.fullmatch(r"(.+?)(\.base_layer)?\.(weight|bias)", name)]:
            owner, _, own = name.rpartition(".")
            path = owner.removesuffix(".base_layer")
            module = at.get(path)
            stored = module._parameters.get(own) if module is not None else None
            embeddings = [getattr(self.model, f"get_{end}_embeddings", lambda: None)() for end in ("input", "output")]
            if stored is None or module not in embeddings:
                continue
            value = self.tensor(name)
            if value.shape != stored.shape:
                refuse(
                    self.weights,
                    f"{path}.{own} has shape {list(value.shape)}, the model's {list(stored.shape)}; "
                    f"call model.resize_token_embeddings({value.shape[0]}) first",
                )
            if not torch.equal(value.to(stored.dtype), stored.detach().cpu()):
                self._refuse_tied(path, own)
                self.trained(path, own, value)

    def whole(self, key: str, default: int) -> int:
        """A whole number of at least 1."""
        value = self.take(key, default, int)
        if not 1 <= value < 1 << 24:
            refuse(self.file, f"{key}={value} is not allowed; it must be a whole number of at least 1")
        return value

    def number(self, key: str, default: float) -> float:
        """A finite number."""
        value = float(self.take(key, default, float))
        if not math.isfinite(value):
            refuse(self.file, f"{key}={value} is not allowed; it must be finite")
        return value

    def flag(self, key: str, default: bool = False) -> bool:
        """True or false."""
        return bool(self.take(key, default, bool, type(None)))

    def patterns(self, key: str, kind: type) -> dict[str, Any]:
        """A mapping of regular expressions over module names to numbers."""
        found = self.take(key, None, dict) or {}
        for pattern, value in found.items():
            good = type(value) is kind or (kind is float and type(value) is int)
            if not good or value <= 0:
                refuse(self.file, f"{key}: {pattern!r} has {str(value)[:40]!r}; it must be a positive {kind.__name__}")
            try:
                regex.compile(pattern)
            except regex.error as error:
                refuse(self.file, f"{key} has {pattern!r}, which is not a regular expression: {error}")
        return found


ALL = "all"


def _short(name: str) -> str:
    for prefix in ("base_model.model.", "base_model."):
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return name
