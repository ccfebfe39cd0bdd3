"""What a method puts at a site: a delta of a weight, a module on activations, a wrapper of a call.

A part owns its tensors and knows its mathematics. It does not know its name, its device, whether it is active, or what
else sits at the same place; `core.graft` does. A part can be written to a file and made again from it without the
method, its data or its random numbers: `settings` names the plain constructor arguments, the tensors are the rest.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from ..model.anatomy import Site
    from ..model.weights import Weight

PARTS: dict[str, type[Part]] = {}


class Part(nn.Module):
    """Base of everything that can sit at a site.

    Class attributes:
        settings: names of constructor arguments that are plain values (kept as attributes of the same name).
        borrowed: names of constructor arguments that are modules shared by several parts of one adapter.
        mergeable: whether the change can be folded into the base's parameters.
    """

    settings: ClassVar[tuple[str, ...]] = ()
    borrowed: ClassVar[tuple[str, ...]] = ()
    mergeable: ClassVar[bool] = False
    site: Site

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if PARTS.setdefault(cls.__name__, cls).__module__ != cls.__module__:
            raise TypeError(f"two parts are called {cls.__name__}; files could not tell them apart")

    def configuration(self) -> dict[str, Any]:
        """The plain constructor arguments, as JSON can hold them."""
        return {name: getattr(self, name) for name in self.settings}

    def stop_dropping(self) -> None:
        """Set every dropout to zero."""
        for kind in ("dropout", "row_dropout", "module_dropout"):
            if getattr(self, kind, 0.0):
                setattr(self, kind, 0.0)

    def tensors(self) -> dict[str, Tensor]:
        """What a file keeps: own parameters and persistent buffers, borrowed modules left out."""
        lent = tuple(f"{name}." for name in self.borrowed)
        return (
            {name: value for name, value in self.state_dict().items() if not name.startswith(lent)}
            if lent
            else dict(self.state_dict())
        )

    @classmethod
    def remade(cls, settings: dict[str, Any], tensors: dict[str, Tensor], shared: dict[str, nn.Module]) -> Part:
        """The part a file describes.

        Tensors that are constructor arguments are given to the constructor. For a part whose constructor takes only
        sizes, it runs on the meta device first, so that a false file cannot make it allocate.

        Raises:
            ValueError: when settings or tensors are not those of this kind of part.
        """
        arguments = inspect.signature(cls.__init__).parameters
        try:
            direct = {name: value for name, value in tensors.items() if name in arguments}
            with torch.device("meta") if not direct else torch.device("cpu"):
                part = cls(**settings, **direct, **shared)
        except (TypeError, RuntimeError, KeyError, OverflowError, MemoryError) as error:
            raise ValueError(
                f"no {cls.__name__} can be made of {sorted(settings)} and {sorted(tensors)}: {error}"
            ) from None
        wanted = part.tensors()
        if set(wanted) != set(tensors):
            raise ValueError(f"{cls.__name__} has tensors {sorted(wanted)}, the file {sorted(tensors)}")
        for name, value in tensors.items():
            if wanted[name].shape != value.shape:
                raise ValueError(
                    f"{cls.__name__}.{name} has shape {list(wanted[name].shape)}, the file {list(value.shape)}"
                )
            if wanted[name].is_floating_point() != value.is_floating_point():
                raise ValueError(f"{cls.__name__}.{name} has dtype {wanted[name].dtype}, the file {value.dtype}")
        if not direct:
            part.load_state_dict({**tensors}, strict=False, assign=True)
            left = [n for n, t in (*part.named_parameters(), *part.named_buffers()) if t.is_meta]
            if left:
                raise ValueError(f"{cls.__name__} needs {left}, which the file does not hold")
        return part


class Delta(Part):
    """A change of one weight `W` (`out x in`).

    An additive delta defines `dense()`, the matrix it adds; any other defines `fold(W)`, the weight it makes of `W`.
    That is the definition, and enough. `side(x)`, the product of an additive delta with activations, is there when it
    can be had without building the matrix; `act` is the same for a delta that is not additive.

    Class attributes:
        additive: `fold(W) = W + dense()`.
        lean: there is a `side` (or `act`) that costs less than building the matrix.

    Attributes:
        replaces: what is made of the weight has nothing of it.
        watch: hears in every backward pass what the change is and the loss's gradient with respect to it, some rows of
            `out x in` at a time, and how many entries there are in all; set by rules that score whole changes, on
            deltas that say they can be watched.
    """

    watch: Callable[[Tensor, Tensor, int], None] | None = None
    replaces: bool = False
    additive: ClassVar[bool] = True
    lean: ClassVar[bool] = False
    mergeable: ClassVar[bool] = True

    def dense(self) -> Tensor:
        """The matrix that is added, `out x in`, differentiable."""
        raise NotImplementedError(f"{type(self).__name__} adds no matrix; it folds the weight")

    def fold(self, weight: Tensor) -> Tensor:
        """The changed weight, `out x in`, in `weight`'s dtype."""
        change = self.dense()
        return (weight.to(torch.promote_types(weight.dtype, change.dtype)) + change).to(weight.dtype)

    def settle(self, weight: Weight) -> None:
        """Make constants from the base's weight, once, when the delta comes to its place; no file holds them."""

    def fold_bias(self, bias: Tensor | None) -> Tensor | None:
        """The changed bias."""
        return bias

    def view(self, layer: nn.Module, parameter: str = "weight") -> Weight:
        """The rows of a layer's parameter that this delta is for."""
        from ..model.weights import Weight

        weight = Weight(layer, parameter, self.site.rows)
        if weight.rows is not None:
            # Thousands of rows on another device: copying them there in every pass would cost more than the change.
            kept = self.__dict__.get("_rows")
            if kept is None or kept.device != weight.device:
                with torch.inference_mode(False):
                    kept = self.__dict__["_rows"] = weight.index()
            weight.known = kept
        return weight

    def prefers_side(self, tokens: int, weight: Weight) -> bool:
        """Whether `side` is cheaper than building the weight, for this many rows of activations."""
        return self.lean

    def side(self, x: Tensor) -> Tensor:
        """`x dense()^T`, for `x` of shape `... x in`."""
        return nn.functional.linear(x, self.dense().to(x.dtype))

    def act(self, x: Tensor, y: Tensor, weight: Weight) -> Tensor:
        """The layer's new output, from its input `x`, its base output `y` (may be overwritten) and its weight."""
        return y.add_(self.side(x))

    def gains(self) -> Tensor | None:
        """Factors of the layer's outputs (bias included), for a change that is nothing else; None otherwise."""
        return None

    def around(self, call: Callable[[Tensor], Tensor], x: Tensor, weight: Weight) -> Tensor | None:
        """The layer's new output by way of its own call, for a change of what the layer reads; None otherwise."""
        return None

    def with_base(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        """Base product and change in one go, where an operator has a fused form; None otherwise."""
        return None


class Module(Part):
    """A change of activations at a module's input or output (`... x width`)."""

    def input(self, x: Tensor) -> Tensor:
        """What the module reads instead of `x`."""
        return x

    def output(self, y: Tensor, x: Tensor) -> Tensor:
        """What the module gives instead of `y`; `x` is its original input."""
        return y


class Wrapper(Part):
    """A change that owns the call of the module it sits at: prompts, side networks, residual rearrangements.

    Class attributes:
        routable: it changes no activation, so that examples may have adapters of their own beside it.
    """

    routable: ClassVar[bool] = False

    def around(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What the module returns instead of `call(*args, **kwargs)`."""
        raise NotImplementedError

    def within(self, layer: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The same for a part that needs the module itself, not only its call."""
        return self.around(call, *args, **kwargs)


class Trained(Part):
    """A parameter of the base that is itself trained, in place.

    Holds the base's own value on the CPU, so that disabling, switching and detaching give it back bit for bit. Of a
    parameter that is sharded over processes all of them hold the whole value, and must enter and leave together.
    """

    mergeable = True
    pristine: Tensor | None
    learned: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.pristine = None  # the base's value while ours is in the model
        self.learned = None  # our value while the base's is in the model

    def enter(self, parameter: Tensor) -> None:
        """Put the learned value into the model, keeping the base's."""
        if self.pristine is None and not parameter.is_meta:
            self.pristine = _held(parameter)
            if self.learned is not None:
                _put(parameter, self.learned)
                self.learned = None

    def leave(self, parameter: Tensor) -> None:
        """Put the base's value back, keeping the learned one."""
        if self.pristine is not None:
            self.learned = _held(parameter)
            _put(parameter, self.pristine)
            self.pristine = None


def _held(parameter: Tensor) -> Tensor:
    """A copy on the CPU, gathered where the parameter is sharded."""
    value: Any = parameter.detach()
    return (value.full_tensor() if hasattr(value, "full_tensor") else value).to("cpu", copy=True)


def _put(parameter: Tensor, value: Tensor) -> None:
    """Give a parameter a whole value; where it is sharded each process takes its share."""
    if not hasattr(parameter, "full_tensor"):
        parameter.data.copy_(value)
        return
    from torch.distributed.tensor import distribute_tensor  # imported only where something is sharded

    sharded: Any = parameter.detach()
    mine = distribute_tensor(value.to(sharded.device), sharded.device_mesh, sharded.placements, src_data_rank=None)
    sharded.to_local().copy_(mine.to_local())


class Shared(nn.Module):
    """Tensors that several parts of one adapter borrow: a random basis, a vector bank, a hyper-network.

    `settings` names the plain constructor arguments, as for a part; tensors made from a seed are non-persistent
    buffers and are not stored.
    """

    settings: ClassVar[tuple[str, ...]] = ()
    kinds: ClassVar[dict[str, type[Shared]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Shared.kinds[cls.__name__] = cls

    def configuration(self) -> dict[str, Any]:
        """The plain constructor arguments, as JSON can hold them."""
        return {name: getattr(self, name) for name in self.settings}


def heard(watch: Callable[[Tensor, Tensor, int], None] | None, change: Tensor) -> Tensor:
    """A delta's matrix, whose gradient its watch will hear if there is one."""
    if watch is not None and change.requires_grad:
        kept = change.detach()
        change.register_hook(lambda gradient: watch(kept, gradient, kept.numel()))
    return change


def frozen(module: nn.Module, *names: str) -> None:
    """Mark parameters as constants of the adapter: stored, never trained."""
    for name in names:
        module.get_parameter(name).requires_grad_(False)


def trainable(parts: Iterable[nn.Module]) -> list[nn.Parameter]:
    """The parameters of some parts that receive gradients, each once."""
    seen: dict[int, nn.Parameter] = {}
    for part in parts:
        for parameter in part.parameters():
            if parameter.requires_grad:
                seen.setdefault(id(parameter), parameter)
    return list(seen.values())


def in_place(part: Part, site: Site) -> bool:
    """Whether a part brings a whole parameter of the base with it, which then need not train, nor be the same."""
    return isinstance(part, Trained) or (isinstance(part, Delta) and part.replaces and site.rows is None)
