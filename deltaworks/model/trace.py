"""What a model does with its tensors, from one forward pass that computes nothing.

A `ghost` of the model (the same modules, every tensor on the meta device, linear layers and experts reduced to their
shapes) runs on dummy inputs. That costs milliseconds and no memory whatever the model's size, works on quantised
bases, and tells which module reads which tensor: what is a pre-norm, what crosses to the encoder, where the residual
is added.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .kinds import GRAFT, experts_shapes, is_embedding, is_linear, is_norm, linear_shape

Key = tuple[int, int]
"""Identity of a tensor's contents: its storage and how often that was written to. A view has its base's key."""

TOKENS = 4


@dataclass
class Call:
    """One call of a module: the tensors it read and returned, and its place in the order of events."""

    path: str
    start: int
    inputs: tuple[Key, ...] = ()
    outputs: tuple[Key, ...] = ()
    end: int = -1


@dataclass
class Trace:
    """All calls of one forward pass in the order in which they began; `error` says why it ended early, if it did."""

    calls: list[Call] = field(default_factory=list)
    error: str | None = None

    def __post_init__(self) -> None:
        self._clock = 0
        self._first: dict[str, Call] = {}
        self._alive: list[Tensor] = []
        self._open: list[Call] = []

    def first(self, path: str | None) -> Call | None:
        return self._first.get(path) if path is not None else None

    def within(self, path: str) -> list[Call]:
        """The calls of the modules below `path`, itself not among them."""
        return [call for call in self.calls if call.path.startswith(path + ".")]

    def tick(self) -> int:
        self._clock += 1
        return self._clock

    def keys(self, values: Any) -> tuple[Key, ...]:
        tensors = list(_tensors(values))
        self._alive += tensors  # or a later tensor could be given the storage, and so the key, of a dead one
        return tuple((tensor.untyped_storage()._cdata, tensor._version) for tensor in tensors)

    def watch(self, model: nn.Module) -> None:
        for path, module in model.named_modules():

            def enter(_: nn.Module, args: Any, kwargs: Any, path: str = path) -> None:
                # A module called by keyword is given its hidden states first all the same.
                call = Call(path, self.tick(), self.keys((args, kwargs)))
                self.calls.append(call)
                self._first.setdefault(path, call)
                self._open.append(call)

            def leave(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
                call = self._open.pop()
                call.outputs, call.end = self.keys(output), self.tick()

            module.register_forward_pre_hook(enter, with_kwargs=True)
            module.register_forward_hook(leave, with_kwargs=True)


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, dict):
        for value in values.values():
            yield from _tensors(value)
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _tensors(value)


class _Decided(TorchDispatchMode):
    """Answers the questions that a meta tensor cannot (`bool(mask.all())`): False, or one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return False if args[0].dtype == torch.bool else torch.ones((), dtype=args[0].dtype).item()
        return func(*args, **(kwargs or {}))


def ghost(model: nn.Module, device: str = "meta") -> nn.Module:
    """A copy of `model` in eval mode that weighs nothing: no hooks, no attached parts, no real linear algebra.

    On "meta" nothing is computed at all. On "cpu" every weight is one number seen at its full shape (ones for vectors,
    zeros for the rest), linear layers, embeddings and experts return zeros, and everything else computes.
    """
    memo: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        empty = _weightless(tensor, device)
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
    shell = copy.deepcopy(model, memo)
    for module in shell.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            hooks.clear()
        module.__dict__.pop("forward", None)  # a forward wrapped for offloading is bound to the original
        if module._modules.pop(GRAFT, None) is not None:
            module.__class__ = type(module).__mro__[1]
        if hasattr(getattr(module, "config", None), "_attn_implementation"):
            module.config._attn_implementation = "eager"  # type: ignore[union-attr]
        if is_linear(module):
            stub(module, linear_shape(module)[0])
        elif is_embedding(module) and device != "meta":
            stub(module, int(module.embedding_dim), as_dtype=torch.get_default_dtype())  # type: ignore[arg-type]
        elif experts_shapes(module) or (device == "meta" and is_norm(module)):
            module.forward = _zeros_like
    return shell.eval()


def _weightless(tensor: Tensor, device: str) -> Tensor:
    if device == "meta":
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    if not isinstance(tensor, nn.Parameter) and tensor.device.type != "meta":
        return tensor.detach().to(device)  # masks and frequencies: small, and their values matter
    dtype = torch.get_default_dtype() if tensor.is_floating_point() else tensor.dtype
    one = torch.ones if tensor.ndim <= 1 or dtype == torch.bool else torch.zeros
    return one((), dtype=dtype, device=device).expand(tensor.shape)


def stub(module: nn.Module, fan_out: int, as_dtype: torch.dtype | None = None) -> None:
    """Replace what a layer computes by nothing of the right shape, `... x fan_out`."""

    def forward(x: Tensor, *_: Any, **__: Any) -> Tensor:
        if as_dtype is not None:
            return torch.zeros(*x.shape, fan_out, dtype=as_dtype, device=x.device)
        return x.new_zeros(*x.shape[:-1], fan_out)

    module.forward = forward


def _zeros_like(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return torch.zeros_like(x)


def trace(model: nn.Module) -> Trace:
    """Run `model`'s ghost on dummy inputs; what was recorded before an error stays, since it is true all the same."""
    best = Trace(error="the model's inputs could not be guessed")
    for args, kwargs in dummy_inputs(model):
        for device in ("meta", "cpu"):  # what depends on values (an expert's list of tokens) can only run for real
            record = Trace()
            try:
                shell = ghost(model, device)
                record.watch(shell)
                with torch.no_grad(), torch.random.fork_rng(devices=[]), _Decided():
                    shell(*(on(device, value) for value in args), **{key: on(device, kwargs[key]) for key in kwargs})
            except Exception as error:  # a model may refuse dummy inputs in any way it likes
                record.error = f"{type(error).__name__}: {error}".splitlines()[0]
            if best.error and (record.error is None or len(record.calls) > len(best.calls)):
                best = record
            if best.error is None:
                return best
    return best


def on(device: str, value: Any) -> Any:
    """A dummy input on a device; anything that is no tensor as it is."""
    return torch.ones_like(value, device=device) if isinstance(value, Tensor) else value


def dummy_inputs(model: nn.Module) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Candidate arguments (positional, by keyword) of a forward pass, all on meta, the most complete first."""
    known = _keywords(model)
    if known:
        yield (), known
        for name in ("pixel_values", "input_ids"):
            if name in known and len(known) > 1:
                yield (), {key: value for key, value in known.items() if key != name}
        return
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            yield (_ids(),), {}
        elif isinstance(module, nn.Conv2d):
            yield (torch.empty(1, module.in_channels, 32, 32, device="meta"),), {}
        elif isinstance(module, nn.Conv1d):
            yield (torch.empty(1, module.in_channels, 32, device="meta"),), {}
        elif is_linear(module):
            width = linear_shape(module)[1]
            yield (torch.empty(1, width, device="meta"),), {}
            yield (torch.empty(1, TOKENS, width, device="meta"),), {}
        else:
            continue
        return


def _ids() -> Tensor:
    return torch.ones(1, TOKENS, dtype=torch.long, device="meta")


def _keywords(model: nn.Module) -> dict[str, Any]:
    """Inputs by the names that `model.forward` has for them, sized by its configuration."""
    config = getattr(model, "config", None)
    names = inspect.signature(type(model).forward).parameters
    if config is None:
        return {}
    made: dict[str, Any] = {}
    if "input_ids" in names:
        made["input_ids"] = _ids()
    if "pixel_values" in names:
        vision = getattr(config, "vision_config", config)
        size = getattr(vision, "image_size", None) or 32
        height, width = (size, size) if isinstance(size, int) else size
        made["pixel_values"] = torch.empty(1, getattr(vision, "num_channels", 3), height, width, device="meta")
    if "input_features" in names:
        bins, positions = getattr(config, "num_mel_bins", 80), getattr(config, "max_source_positions", 1500)
        made["input_features"] = torch.empty(1, bins, 2 * positions, device="meta")
    if "input_values" in names:
        made["input_values"] = torch.empty(1, 16_000, device="meta")
    if made and "decoder_input_ids" in names:
        made["decoder_input_ids"] = _ids()
    if made and "use_cache" in names:
        made["use_cache"] = False
    return made
