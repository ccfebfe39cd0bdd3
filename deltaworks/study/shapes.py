"""Running a model without its numbers: every floating point tensor is a shape, every index is real.

torch's `FakeTensor` gives an operator's output shape, dtype and device without computing it. What a model decides by
numbers (which tokens have a target, whether a mask hides anything, which expert a token goes to) it decides by
integers, and these are small: here they are computed, so that a run takes the way it would really take. Where floating
point numbers choose (a router's `topk`), the choice is drawn at random.

`Ledger` keeps books meanwhile: which storages are alive, what they are for, what was the most at any time; floating
point operations and bytes moved of every operator.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

aten, prims = torch.ops.aten, torch.ops.prim
KINDS = ("weights", "gradients", "optimizer", "activations", "logits")
LARGE, MANY = 1 << 26, 1 << 22  # elements
# What makes indices of no tensor at all; everything else that is made so and is floating point becomes a shape.
COUNTING = (aten.randint, aten.arange, aten.randperm, aten.scalar_tensor)
# Operators whose kernels make something of their input's size on the way.
SCRATCH = {aten.logsumexp}
# Operators that answer from a tensor's metadata.
ASKING = {prims.device.default, aten.is_same_size.default}


@dataclass
class Ledger:
    """What is alive on one device, by purpose, in bytes.

    Attributes:
        device: type of the device that is watched.
        purpose: what a new storage is for, one of `KINDS`.
        vocabulary: a new activation of this width counts as logits.
        now: bytes alive, by purpose.
        peak: the same at the moment when most was alive since `forget`.
    """

    device: str = "cpu"
    purpose: str = "weights"
    vocabulary: int | None = None
    now: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    peak: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    _held: dict[int, tuple[int, str]] = field(default_factory=dict)
    _total: int = 0
    _most: int = 0

    def forget(self) -> None:
        """Let only what comes from now on count as peak."""
        self.peak, self._most = dict(self.now), self._total

    def hold(self, tensor: Tensor) -> None:
        """Enter a tensor's storage, unless it is known."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._held:
            return
        place = tensor.fake_device if isinstance(tensor, FakeTensor) else tensor.device
        size = storage.nbytes() if place.type == self.device else 0
        purpose = self.purpose
        if purpose == "activations" and tensor.dim() > 1 and tensor.shape[-1] == self.vocabulary:
            purpose = "logits"
        self._held[key] = size, purpose
        weakref.finalize(storage, self._drop, key)
        self._add(purpose, size)

    def pass_by(self, size: int) -> None:
        """Count bytes that are there for an operator's time only."""
        self._add("activations", size)
        self._add("activations", -size)

    def resize(self, tensor: Tensor, size: int) -> None:
        """Let a tensor's storage count for `size` bytes, such as one that stands for a packed weight."""
        key = tensor.untyped_storage()._cdata
        held, purpose = self._held[key]
        self._held[key] = size, purpose
        self._add(purpose, size - held)

    def mark(self, tensors: Iterable[Tensor], purpose: str) -> None:
        """Say what these tensors are for."""
        for tensor in tensors:
            key = tensor.untyped_storage()._cdata
            if key in self._held:
                size, was = self._held[key]
                self._held[key] = size, purpose
                self.now[was] -= size
                self.now[purpose] += size

    def _add(self, purpose: str, size: int) -> None:
        self.now[purpose] += size
        self._total += size
        if self._total > self._most:
            self.peak, self._most = dict(self.now), self._total

    def _drop(self, key: int) -> None:
        size, purpose = self._held.pop(key)
        self.now[purpose] -= size
        self._total -= size


@dataclass
class Effort:
    """What a run computes: for every kind of operator call its number, floating point operations and bytes moved."""

    calls: dict[tuple[int, int], int] = field(default_factory=dict)

    def add(self, operations: int, moved: int) -> None:
        """Count one call."""
        self.calls[operations, moved] = self.calls.get((operations, moved), 0) + 1

    def seconds(self, flops: float, bandwidth: float, call: float) -> float:
        """The roofline's time: an operator takes as long as its slower half, and never less than a call.

        Args:
            flops: floating point operations a second.
            bandwidth: bytes a second.
            call: seconds that any operator takes.
        """
        return sum(n * (max(work / flops, moved / bandwidth) + call) for (work, moved), n in self.calls.items())


class Shapes(TorchDispatchMode):
    """Within this mode tensors that are made are shapes, and the ledger is kept.

    Args:
        device: where the tensors are thought to be.
    """

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        self.device = torch.device(device)
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.ledger = Ledger(self.device.type)
        self.effort: Effort | None = None
        self._known: dict[Any, Any] = {}
        self._kinds: dict[Any, str] = {}

    def empty(self, model: nn.Module, dtype: torch.dtype | None = None) -> None:
        """Turn a model's tensors, wherever they are, into shapes on the device; integers into zeros.

        Args:
            model: changed in place; parameters stay parameters, tied ones tied.
            dtype: of floating point parameters, None for their own.
        """
        made: dict[int, Any] = {}
        for module in model.modules():
            for tensors in (module._parameters, module._buffers, module.__dict__):
                for name, value in list(tensors.items()):
                    if isinstance(value, Tensor):
                        if id(value) not in made:
                            made[id(value)] = self._emptied(value, dtype)
                        tensors[name] = made[id(value)]

    def _emptied(self, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
        trained = isinstance(tensor, nn.Parameter)
        if not tensor.is_floating_point():
            empty = torch.zeros(tensor.shape, dtype=tensor.dtype, device=self.device)
        else:
            kept = dtype if trained and dtype is not None else tensor.dtype
            empty = self.make(tensor.shape, tensor.stride() if not tensor.is_contiguous() else None, kept)
        self.ledger.hold(empty)
        return nn.Parameter(empty, requires_grad=tensor.requires_grad) if trained else empty

    def make(
        self, shape: Iterable[int], stride: Iterable[int] | None, dtype: torch.dtype, device: torch.device | None = None
    ) -> Tensor:
        """A tensor without values."""
        size = tuple(shape)
        bare = torch.empty_strided(size, tuple(stride), dtype=dtype, device="meta") if stride is not None else (
            torch.empty(size, dtype=dtype, device="meta")
        )  # fmt: skip
        return FakeTensor(self.fake, bare, device or self.device)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in ASKING and isinstance(args[0], FakeTensor):
            return args[0].fake_device if func is prims.device.default else args[0].shape == args[1].shape
        kwargs = kwargs or {}
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        if not any(isinstance(tensor, FakeTensor) for tensor in tensors):
            result = self._real(func, args, kwargs, tensors)
        elif func is aten._local_scalar_dense.default:
            # A number that is not there: a plausible one.
            return False if args[0].dtype == torch.bool else torch.ones((), dtype=args[0].dtype).item()
        else:
            result = self._shaped(func, args, kwargs, tensors)
        if isinstance(result, Tensor):
            self.ledger.hold(result)
        elif isinstance(result, (tuple, list)):
            for value in tree_leaves(result):
                if isinstance(value, Tensor):
                    self.ledger.hold(value)
        return result

    def _real(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> Any:
        """A call without shapes among its tensors: computed, unless it makes floating point tensors of nothing."""
        if not tensors:
            dtype = kwargs.get("dtype") or torch.get_default_dtype()
            if self._kind(func) == "filling" and dtype.is_floating_point:
                place = torch.device(kwargs.get("device") or self.device)
                bare = func(*args, **{**_drawn(kwargs), "device": "meta"})
                return FakeTensor(self.fake, bare, place)
        elif math.prod(tensor.numel() or 1 for tensor in tensors) > LARGE and self._kind(func) == "making":
            # Indices that outgrow what is worth computing, such as masks of long sequences, become shapes as well.
            with contextlib.suppress(RuntimeError, NotImplementedError):
                bare = func(*tree_map_only(Tensor, lambda t: t.to("meta"), args), **kwargs)
                if isinstance(bare, Tensor) and bare.is_meta and bare.numel() > LARGE:
                    return FakeTensor(self.fake, bare, tensors[0].device)
        return func(*args, **kwargs)

    def _shaped(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> Any:
        kind = self._kind(func)
        if kind == "changing":
            self._count(func, args, kwargs, tensors, args[0])
            return args[0] if func._schema.returns else None
        if kind == "viewing":
            with in_kernel_invocation_manager(self.fake):
                bare = func(*args, **kwargs)
            place = next(tensor.fake_device for tensor in tensors if isinstance(tensor, FakeTensor))
            return tree_map_only(Tensor, lambda view: FakeTensor(self.fake, view, place), bare)
        if func._overloadpacket is aten.index:
            args = (args[0], _everywhere(args[1]))
        if func._overloadpacket is aten.topk:
            return self._chosen(func, args, kwargs)
        if func._overloadpacket is aten._grouped_mm and args[0].dtype != torch.bfloat16:
            return self._grouped(func, args, kwargs)
        if func._overloadpacket in SCRATCH:
            self.ledger.pass_by(args[0].numel() * args[0].element_size())
        key = _key(func, args, kwargs) if kind == "making" else None
        known = self._known.get(key) if key is not None else None
        if known is None:
            result = func(*args, **_drawn(kwargs))
            cost = self._count(func, args, kwargs, tensors, result)
            plan = [_plan(value) for value in (result if isinstance(result, tuple) else (result,))]
            if key is None or None in plan:
                return result
            known = self._known[key] = isinstance(result, tuple), plan, cost
        elif self.effort is not None:
            self.effort.add(*known[2])
        several, plan, _ = known
        made = tuple(self.make(*item) for item in plan)
        return made if several else made[0]

    def _kind(self, func: Any) -> str:
        return self._kinds.get(func) or self._kinds.setdefault(func, _kind(func))

    def _grouped(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A grouped product in another dtype than bfloat16, the only one that torch gives its shape for."""
        halves = [self.make(tensor.shape, tensor.stride(), torch.bfloat16) for tensor in args[:2]]
        like = func(*halves, *args[2:], **kwargs)
        result = self.make(like.shape, like.stride(), args[0].dtype)
        rows, width = args[0].shape[-2:]
        outer = result.shape[-1] if args[0].dim() == 2 and args[1].dim() == 3 else args[1].shape[-1]
        if self.effort is not None:
            moved = sum(tensor.numel() * tensor.element_size() for tensor in (*args[:2], result))
            self.effort.add(2 * rows * width * outer, moved)
        return result

    def _count(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor], result: Any) -> tuple[int, int]:
        outputs = [value for value in tree_leaves(result) if isinstance(value, Tensor)]
        moved = sum(tensor.numel() * tensor.element_size() for tensor in (*tensors, *outputs))
        formula = FORMULAS.get(func._overloadpacket)
        cost = (int(formula(*args, **kwargs, out_val=result)) if formula is not None else 0, moved)
        if self.effort is not None:
            self.effort.add(*cost)
        return cost

    @staticmethod
    def _chosen(func: Any, args: Any, kwargs: Any) -> Any:
        """`topk` with indices drawn at random, all different."""
        values, indices = func(*args, **kwargs)
        axis = args[2] if len(args) > 2 else kwargs.get("dim", -1)
        whole = list(indices.shape)
        count = whole[axis]
        whole[axis] = args[0].shape[axis]
        generator = torch.Generator().manual_seed(0)
        if math.prod(whole) > MANY:  # too many to sort: one of each of as many stretches
            edges = torch.arange(count + 1) * whole[axis] // max(count, 1)
            chance = torch.rand(indices.shape, generator=generator, dtype=torch.float64).movedim(axis, -1)
            drawn = (edges[:-1] + (chance * edges.diff()).long()).movedim(-1, axis)
        else:
            drawn = torch.rand(whole, generator=generator).argsort(axis).narrow(axis, 0, count)
        return values, drawn.contiguous().to(values.fake_device)


def _everywhere(indices: Iterable[Tensor | None]) -> list[Tensor | None]:
    """Indices in which a mask without values, whose choice is not known, chooses all there is."""
    found: list[Tensor | None] = []
    for index in indices:
        if isinstance(index, FakeTensor) and index.dtype == torch.bool:
            found += torch.ones(index.shape, dtype=torch.bool).nonzero().unbind(1)
        else:
            found.append(index)
    return found


def _drawn(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments without a generator, which shapes need not."""
    return {**kwargs, "generator": None} if "generator" in kwargs else kwargs


def _kind(func: Any) -> str:
    """What an operator does: fills a tensor, makes one of others, changes its first argument, views it, or neither."""
    schema = func._schema
    if torch.Tag.inplace_view in func.tags or torch.Tag.data_dependent_output in func.tags:
        return "special"
    if any(argument.name == "device" for argument in schema.arguments) and not any(
        str(argument.type).startswith(("Tensor", "List[Tensor")) for argument in schema.arguments
    ):
        return "special" if func._overloadpacket in COUNTING else "filling"
    aliases = [argument.alias_info for argument in schema.arguments]
    if schema.name.endswith("_") and aliases and aliases[0] is not None and aliases[0].is_write:
        return "changing"
    if func is aten._unsafe_view.default:  # a view that its schema keeps quiet about
        return "viewing"
    if any(alias is not None for alias in aliases):
        written = any(alias is not None and alias.is_write for alias in aliases)
        return "special" if written else "viewing"
    return "making"


def _key(func: Any, args: Any, kwargs: Any) -> Any:
    """What an output's shape depends on; None where that is more than shapes."""
    parts: list[Any] = [func]
    if not (_spelled(args, parts) and _spelled(tuple(kwargs.items()), parts)):
        return None
    return tuple(parts)


def _spelled(values: Iterable[Any], parts: list[Any]) -> bool:
    for value in values:
        if isinstance(value, Tensor):
            if type(value) not in (FakeTensor, nn.Parameter):
                return False
            parts += (value.shape, value.stride(), value.dtype)
        elif isinstance(value, (list, tuple)):
            parts.append(len(value))
            if not _spelled(value, parts):
                return False
        else:
            parts.append((type(value), value))
    return True


def _plan(value: Any) -> Any:
    """How to make a tensor like this one again."""
    if not isinstance(value, FakeTensor) or value.storage_offset() or value.untyped_storage().nbytes() != (
        value.numel() * value.element_size()
    ):  # fmt: skip
        return None
    return value.shape, value.stride(), value.dtype, value.fake_device


def _attention(query: Any, key: Any, value: Any, *args: Any, is_causal: bool = False, out_val: Any = None, **_: Any):
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *args: Any, out_val: Any = None, **_: Any):
    return sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)


FORMULAS: dict[Any, Any] = {
    **flop_registry,
    aten.addmm_: flop_registry[aten.addmm],
    aten.baddbmm_: flop_registry[aten.baddbmm],
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
