"""How a change enters a model: the layer's class is swapped for a subclass made on the fly.

The layer keeps its parameters, their names and its place; its parts hang below it as the child `deltaworks`, so device
moves, `state_dict`, deepcopy, gradient checkpointing, compilation and sharding see ordinary modules. Undoing is setting
the class back. There is no hook, so nothing is lost when a model is copied, and no wrapper, so `isinstance`, class
names and attribute access are those of the base.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from ..model.anatomy import Site
from ..model.kinds import has_statistics
from ..model.weights import CONVOLUTIONS, Weight, consumes, dequantised, is_ordinary, is_quantised
from .attention import Attending, attended
from .operators.effective import effective_linear, folded
from .operators.low_rank import Factored, add_branches, add_unwatched, lifted
from .part import Delta, Module, Part, Trained, Wrapper
from .sharing import Share, Sharing


class Switchboard:
    """Which adapters act, shared by every graft of a model.

    Attributes:
        active: names of the adapters that act, in order of application.
        enabled: False inside `disable`.
        merged: names of the adapters that are folded into the base at present.
        routing: for each example of the batch the adapter that acts on it (None: the base), or None for no routing.
        sharing: products that layers with the same input have in common.
    """

    def __init__(self) -> None:
        self.active: tuple[str, ...] = ()
        self.enabled = True
        self.merged: tuple[str, ...] = ()
        self.routing: tuple[str | None, ...] | None = None
        self.sharing = Sharing()


class Acting(NamedTuple):
    """What changes a module's call at present, sorted."""

    active: tuple[str, ...]
    merged: tuple[str, ...]
    parts: list[Part]
    deltas: list[Delta]
    modules: list[Module]
    attending: list[Attending]
    wrappers: list[Wrapper]


class Graft(nn.Module):
    """The parts at one module: child `<adapter>.<label>` for each.

    Attributes:
        board: what acts at present.
        followers: the grafts of later layers that read the same tensor.
    """

    board: Switchboard
    followers: list[Graft]
    backup: dict[str, Tensor | None]
    _known: Acting | None = None

    def __init__(self, board: Switchboard) -> None:
        super().__init__()
        self.board = board
        self.backup = {}  # parameters as they were before merging
        self.followers = []

    def add(self, adapter: str, label: str, part: Part) -> None:
        """Hang a part of an adapter here."""
        if adapter not in self._modules:
            self.add_module(adapter, nn.Module())
        self.get_submodule(adapter).add_module(label, part)
        self._known = None

    def parts(self, adapter: str) -> list[Part]:
        """The parts of an adapter at this module, in the order they were added."""
        slot = self._modules.get(adapter)
        return [part for part in slot.children() if isinstance(part, Part)] if slot is not None else []

    def acting(self, names: Sequence[str]) -> list[Part]:
        """The parts that change the call, over several adapters."""
        merged = self.board.merged
        parts: list[Part] = []
        for name in names:
            if name not in merged:
                parts += [part for part in self.parts(name) if not isinstance(part, Trained)]
        return parts

    def run(self, layer: nn.Module, call: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        """The layer's output with whatever acts at present."""
        board = self.board
        if not board.enabled:
            return call(*args, **kwargs)
        if board.routing is not None:
            return self._routed(layer, call, args, kwargs, board.routing)
        acting = self._acting()
        if not acting.parts:
            return call(*args, **kwargs)
        if len(acting.deltas) == len(acting.parts):
            return _weighted(layer, call, acting.deltas, self, *args, **kwargs)
        return self._through(layer, call, args, kwargs, acting)

    def _acting(self) -> Acting:
        """What acts at present; sorted anew only when the adapters change, since this runs in every call."""
        known, board = self._known, self.board
        if known is not None and known.active is board.active and known.merged is board.merged:
            return known
        found = _sorted(self.acting(board.active), board.active, board.merged)
        if not torch.compiler.is_compiling():
            self._known = found
        return found

    def sole(self) -> Part | None:
        """The delta of the weight that is all that acts here, if so."""
        parts = self._acting().parts
        if len(parts) != 1 or not self.board.enabled or self.board.routing is not None:
            return None
        return parts[0] if parts[0].site.parameter == "weight" and parts[0].site.rows is None else None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_known": None}

    def _through(
        self, layer: nn.Module, call: Callable[..., Any], args: tuple, kwargs: dict[str, Any], acting: Acting
    ) -> Any:
        inner = call
        if acting.deltas:
            inner = functools.partial(_weighted, layer, call, acting.deltas, None)
        if acting.attending:
            inner = functools.partial(attended, layer, acting.attending, inner)
        for part in acting.wrappers:
            inner = functools.partial(part.within, layer, inner)
        if not acting.modules:
            return inner(*args, **kwargs)
        original, place = _input(args, kwargs)
        x = original
        for module in acting.modules:
            x = module.input(x)
        args, kwargs = place(x)
        result = inner(*args, **kwargs)
        y, rebuild = _output(result)
        for module in acting.modules:
            y = module.output(y, original)
        return rebuild(y)

    def _routed(
        self,
        layer: nn.Module,
        call: Callable[..., Any],
        args: tuple,
        kwargs: dict[str, Any],
        routing: tuple[str | None, ...],
    ) -> Any:
        names = [name for name in dict.fromkeys(routing) if name is not None]
        chosen = {
            name: [part for part in self.acting([name]) if not (isinstance(part, Wrapper) and part.routable)]
            for name in names
        }
        if not any(chosen.values()):
            return call(*args, **kwargs)
        if any(isinstance(part, (Wrapper, Attending)) for parts in chosen.values() for part in parts):
            raise ValueError(
                "per-example adapters cannot hold prompts or side networks, which change the whole batch; "
                "run such an adapter in a batch of its own"
            )
        x, place = _input(args, kwargs)
        if x.shape[0] != len(routing):
            raise ValueError(
                f"the batch has {x.shape[0]} rows at {type(layer).__name__}, the routing {len(routing)}; "
                "give one adapter name per example (fused experts cannot be routed, they see tokens without examples)"
            )
        if consumes(layer) == "linear" and len(args) + len(kwargs) == 1:
            return self._by_group(layer, call, x, place, chosen, routing)
        result = call(*args, **kwargs)
        y, rebuild = _output(result)
        y = y.clone()
        for name, parts in chosen.items():
            mine = [row for row, chosen_name in enumerate(routing) if chosen_name == name]
            rows = torch.tensor(mine, device=x.device)
            acting, part_x = _sorted(parts), x.index_select(0, rows)
            if acting.deltas:
                own = _output(self._through(layer, call, *place(part_x), acting))[0]
            else:  # the layer runs again only where a module reads something else
                own = y.index_select(0, rows)
                for module in acting.modules:
                    changed = module.input(part_x)
                    if changed is not part_x:
                        part_args, part_kwargs = place(changed)
                        own = _output(call(*part_args, **part_kwargs))[0]
                    own = module.output(own, part_x)
            y = y.index_copy(0, rows, own.to(y.dtype))
        return rebuild(y)

    def _by_group(
        self,
        layer: nn.Module,
        call: Callable[..., Any],
        x: Tensor,
        place: Callable[[Tensor], tuple[tuple, dict[str, Any]]],
        chosen: dict[str, list[Part]],
        routing: tuple[str | None, ...],
    ) -> Tensor:
        """A linear layer's output: one product for the examples of each adapter, none for the batch as a whole.

        Low-rank changes that nobody differentiates are added beside one product for all.
        """
        if not torch.is_grad_enabled() and all(_low_rank(parts, x) for parts in chosen.values() if parts):
            args, kwargs = place(x)
            each: list[Any] = [next(iter(chosen.get(name or "", ())), None) for name in routing]
            return add_branches(each, x, call(*args, **kwargs))
        groups: dict[str | None, list[int]] = {}
        for row, name in enumerate(routing):
            groups.setdefault(name if chosen.get(name or "") else None, []).append(row)
        outputs = []
        for name, rows in groups.items():
            first, last = rows[0], rows[-1] + 1
            together = last - first == len(rows)
            mine = x[first:last] if together else x.index_select(0, torch.tensor(rows, device=x.device))
            args, kwargs = place(mine)
            parts = chosen.get(name or "")
            outputs.append(self._through(layer, call, args, kwargs, _sorted(parts)) if parts else call(*args, **kwargs))
        order = [row for rows in groups.values() for row in rows]
        y = torch.cat(outputs)
        if order == sorted(order):
            return y
        back = torch.tensor(order, device=x.device).argsort()
        return y.index_select(0, back)

    def weight(self, layer: nn.Module, parameter: str) -> Tensor | None:
        """A parameter with the active deltas folded in, in storage layout: what code that reads the weight gets."""
        stored = layer._parameters[parameter]
        board = self.board
        deltas = [
            part
            for part in (self.acting(board.active) if board.enabled else [])
            if isinstance(part, Delta) and part.site.parameter == parameter
        ]
        return _folded(layer, parameter, deltas) if deltas else stored


def _low_rank(parts: Sequence[Part], x: Tensor) -> bool:
    """Whether all that acts is one low-rank change of the whole weight, and nothing keeps it from being batched."""
    one = parts[0]
    return (
        len(parts) == 1
        and isinstance(one, Factored)
        and one.site.rows is None
        and one.site.parameter == "weight"
        and one.shareable(x)
    )


def _sorted(parts: list[Part], active: tuple[str, ...] = (), merged: tuple[str, ...] = ()) -> Acting:
    kinds = [[part for part in parts if isinstance(part, kind)] for kind in (Delta, Module, Attending, Wrapper)]
    return Acting(active, merged, parts, *kinds)  # type: ignore[arg-type]


def _input(args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, Callable[[Tensor], tuple[tuple, dict[str, Any]]]]:
    """The activations a call receives, and how to call with others in their place."""
    if args and isinstance(args[0], Tensor):
        return args[0], lambda x: ((x, *args[1:]), kwargs)
    name = next((n for n in ("hidden_states", "input", "x", *kwargs) if isinstance(kwargs.get(n), Tensor)), None)
    if name is not None:
        return kwargs[name], lambda x: (args, {**kwargs, name: x})
    raise ValueError("a module was adapted that is called without any tensor; name a site that receives activations")


def _output(result: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """The activations a call gives (the first of a tuple), and how to give others in their place."""
    if isinstance(result, Tensor):
        return result, lambda y: y
    if isinstance(result, (tuple, list)):
        return result[0], lambda y: type(result)((y, *result[1:]))
    if hasattr(result, "last_hidden_state"):

        def rebuild(y: Tensor) -> Any:
            result["last_hidden_state"] = y
            return result

        return result["last_hidden_state"], rebuild
    raise ValueError(f"a module was adapted that gives {type(result).__name__}; a tensor or a tuple can be changed")


def _weighted(
    layer: nn.Module, call: Callable[..., Any], deltas: list[Delta], graft: Graft | None, *args: Any, **kwargs: Any
) -> Any:
    """The layer's output under its deltas: the side path where it is lean, the effective weight elsewhere.

    With a graft, the layer may share products with others that read the same input.
    """
    kind = consumes(layer)
    if (
        kind == "linear"
        and len(args) + len(kwargs) == 1
        and all(d.site.parameter in ("weight", "bias") for d in deltas)
    ):
        return _linear(layer, call, deltas, graft, args[0] if args else next(iter(kwargs.values())))
    if kind != "other" and len(args) == 1 and not kwargs:
        special = {"embedding": "look_up", "convolution": "convolve"}[kind]
        ready = [d for d in deltas if d.site.parameter == "weight" and d.site.rows is None and hasattr(d, special)]
        factor = _factor(layer)
        summed = len(deltas) == 1 or all(delta.additive for delta in deltas)
        if len(ready) == len(deltas) and factor is not None and summed:
            y = call(*args)
            for delta in deltas:
                y = y + (getattr(delta, special)(args[0], layer) * factor).to(y.dtype)
            return y
    return _substituted(layer, call, deltas, *args, **kwargs)


def _factor(layer: nn.Module) -> Any:
    """What an embedding or a convolution multiplies its product by; None where its class does anything else as well."""
    own = type(layer)._deltaworks_base  # type: ignore[attr-defined]
    if own.forward in (nn.Embedding.forward, *(kind.forward for kind in CONVOLUTIONS)):
        return 1.0
    # Gemma's, BART's and other models' embeddings, which transformers names alike.
    return getattr(layer, "embed_scale", None) if own.__name__.endswith("ScaledWordEmbedding") else None


def _substituted(layer: nn.Module, call: Callable[..., Any], deltas: list[Delta], *args: Any, **kwargs: Any) -> Any:
    """The call with the changed parameters in the places of the stored ones."""
    parameters = dict.fromkeys(delta.site.parameter or "weight" for delta in deltas)
    effective: dict[str, Any] = {
        name: _folded(layer, name, [delta for delta in deltas if delta.site.parameter == name]) for name in parameters
    }
    # An instance attribute hides the registered parameter of the same name, for the time of this call only.
    layer.__dict__.update(effective)
    try:
        return call(*args, **kwargs)
    finally:
        for name in effective:
            del layer.__dict__[name]


def _folded(layer: nn.Module, parameter: str, deltas: Sequence[Delta]) -> Tensor:
    """A parameter in storage layout with deltas folded in, one after the other; a missing bias counts as zero."""
    view = Weight(layer, parameter)
    whole = view.matrix() if view.stored is None else view.canonical(dequantised(layer, view.stored))
    return view.layout(folded(layer, parameter, deltas, whole))


def _linear(
    layer: nn.Module, call: Callable[..., Tensor], deltas: list[Delta], graft: Graft | None, x: Tensor
) -> Tensor:
    if not torch.is_grad_enabled() and _low_rank(deltas, x):
        added = add_unwatched(deltas[0], x, call)  # type: ignore[arg-type]
        if added is not None:
            return added
    changes = [delta for delta in deltas if delta.site.parameter == "weight"]
    if not changes:
        return _substituted(layer, call, deltas, x)
    y = _fused(layer, changes[0], graft, x) if len(changes) == 1 else None
    if y is None:
        y = _summed(layer, call, changes, x)
    for delta in deltas:
        if delta.site.parameter == "bias":
            y = y + _spread(delta, layer, y.shape[-1]).to(y.dtype)
    return y


def _fused(layer: nn.Module, delta: Delta, graft: Graft | None, x: Tensor) -> Tensor | None:
    """The product with the base and a change of the weight at once, for a delta that has a side path for that."""
    stored, bias = layer._parameters["weight"], layer._parameters.get("bias")
    if not delta.lean or delta.site.rows is not None:
        return None
    if stored is None or not _ordinary(layer, stored) or (bias is not None and bias.requires_grad):
        return None
    weight = Weight(layer)
    if not delta.prefers_side(x.numel() // max(x.shape[-1], 1), weight):
        return None
    matrix = weight.canonical(stored)
    share = graft and _share(graft, delta, x) if matrix.dtype == x.dtype else None
    if share:
        return lifted(share.x, share.z, matrix, bias, share.b, share.part.scale)
    return delta.with_base(x, matrix, bias)


def _summed(layer: nn.Module, call: Callable[..., Tensor], changes: list[Delta], x: Tensor) -> Tensor:
    """The layer's output, or that under an effective weight, and the side paths of what is not folded in."""
    stored, weight = layer._parameters["weight"], Weight(layer)
    tokens = x.numel() // max(x.shape[-1], 1)
    # Side paths add up; a delta that is a function of the weight may use its own only where nothing else acts.
    alone = len(changes) == 1
    apart = alone or _disjoint(changes)
    sides = [d for d in changes if d.lean and (d.additive or apart) and d.prefers_side(tokens, weight)]
    if len(sides) < len(changes) and any(not delta.additive for delta in changes):
        sides = []
    folds = [delta for delta in changes if delta not in sides]
    y: Tensor | None = None
    if folds:
        if any(delta.training and getattr(delta, "dropout", 0.0) for delta in folds):
            warnings.warn("dropout does not act where changes of a weight are folded one into another", stacklevel=2)
        y = effective_linear(x, layer, folds)
    elif alone and sides[0].site.rows is None:
        y = sides[0].around(call, x, weight)
        if y is not None:
            return y
    if y is None:
        y = _unpacking(layer, call, x) if _packed(stored, x) else call(x)
    gains = [delta.gains() for delta in sides if delta.site.rows is not None]
    if gains and all(gain is not None for gain in gains) and len(gains) == len(sides):
        return y * _gained(sides, layer, y)
    for delta in sides:
        y = _beside(delta, x, y, layer)
    return y


def _share(graft: Graft, delta: Delta, x: Tensor) -> Share | None:
    if not isinstance(delta, Factored) or (not graft.followers and not graft.board.sharing.shares):
        return None
    return graft.board.sharing.share(graft, delta, x)


def _ordinary(layer: nn.Module, stored: Any) -> bool:
    """Whether the layer is a plain product with a frozen weight, which a fused function may take over."""
    base = getattr(type(layer), "_deltaworks_base", type(layer))
    return (
        is_ordinary(stored)
        and stored.dtype.itemsize > 1  # one-byte floats carry a scale elsewhere
        and not stored.requires_grad
        and base.forward in (nn.Linear.forward, Conv1D.forward)
    )


def _packed(stored: Any, x: Tensor) -> bool:
    """Whether autograd would keep the unpacked weight of a quantised layer; bitsandbytes' functions do not."""
    return (
        stored is not None
        and torch.is_grad_enabled()
        and x.requires_grad
        and not torch.compiler.is_compiling()
        and is_ordinary(x)
        and not torch.is_autocast_enabled(x.device.type)
        and is_quantised(stored)
        and not hasattr(stored, "quant_state")
        and not hasattr(stored, "SCB")
    )


def _unpacking(layer: nn.Module, call: Callable[..., Tensor], x: Tensor) -> Tensor:
    return _Unpacking.apply(x, layer, call)  # type: ignore[return-value]


class _Unpacking(torch.autograd.Function):
    """A quantised layer's own product, whose backward unpacks the weight again instead of keeping it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Module, call: Callable[..., Tensor]) -> Tensor:
        ctx.layer = layer
        y = call(x.detach())
        return y.clone() if y._is_view() else y  # what follows is added in place

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0] @ Weight(ctx.layer).matrix().to(gradients[0].dtype), None, None


def _gained(deltas: Sequence[Delta], layer: nn.Module, y: Tensor) -> Tensor:
    """The factors of several parts of one output as one vector: one product instead of one a part."""
    whole = y.new_ones(y.shape[-1])
    for delta in deltas:
        gain = delta.gains()
        assert gain is not None
        whole = whole.index_copy(0, delta.view(layer).index(), gain.to(y.dtype))
    return whole


def _disjoint(deltas: Sequence[Delta]) -> bool:
    """Whether every delta has a part of a fused weight to itself."""
    return all(delta.site.rows is not None for delta in deltas) and len({d.site.part for d in deltas}) == len(deltas)


def _beside(delta: Delta, x: Tensor, y: Tensor, layer: nn.Module) -> Tensor:
    rows = delta.site.rows
    if rows is None:
        return delta.act(x, y, Weight(layer))
    weight = delta.view(layer)
    index = weight.index()
    # Only parts of a fused weight come here, and their layer's output is nobody else's yet.
    if delta.additive:
        return y.index_add_(-1, index, delta.side(x).to(y.dtype))
    return y.index_copy_(-1, index, delta.act(x, y.index_select(-1, index), weight).to(y.dtype))


def _spread(delta: Delta, layer: nn.Module, width: int) -> Tensor:
    """What a delta of a bias adds, over all outputs."""
    vector = delta.dense()
    if delta.site.rows is None:
        return vector
    return vector.new_zeros(width).index_copy(0, delta.view(layer, "bias").index(), vector)


_SWAPPED: dict[tuple[type, tuple[str, ...]], type] = {}


def swapped(base: type, parameters: tuple[str, ...] = ()) -> type:
    """The subclass of `base` whose calls go through its graft.

    `parameters` are those that other code reads without calling the layer; they become properties that give the
    effective weight.
    """
    if (base, parameters) in _SWAPPED:
        return _SWAPPED[base, parameters]

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._modules["deltaworks"].run(self, functools.partial(base.forward, self), args, kwargs)  # type: ignore[attr-defined]

    def train(self: Any, mode: bool = True) -> Any:
        base.train(self, mode)  # type: ignore[attr-defined]
        self.training = mode and not has_statistics(self)
        return self

    def reduce(self: Any, protocol: Any) -> Any:
        return _revive, (base, parameters), self.__getstate__()

    def effective(name: str) -> property:
        def get(self: Any) -> Tensor | None:
            return self._modules["deltaworks"].weight(self, name)

        return property(get)

    members: dict[str, Any] = {
        "forward": functools.wraps(base.forward)(forward),  # type: ignore[attr-defined]
        "train": functools.wraps(base.train)(train),  # type: ignore[attr-defined]
        "__reduce_ex__": reduce,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "_deltaworks_base": base,
        "_deltaworks_uncalled": parameters,
        **{name: effective(name) for name in parameters},
    }
    _SWAPPED[base, parameters] = type(base.__name__, (base,), members)
    return _SWAPPED[base, parameters]


def _revive(base: type, parameters: tuple[str, ...]) -> nn.Module:
    cls = swapped(base, parameters)
    return cast(nn.Module, object.__new__(cls))


def graft_of(module: nn.Module) -> Graft | None:
    """What hangs at a module, if anything."""
    found = module._modules.get("deltaworks")
    return found if isinstance(found, Graft) else None


def graft(module: nn.Module, board: Switchboard, uncalled: Sequence[str] = ()) -> Graft:
    """The module's graft, made if there is none yet."""
    found = graft_of(module)
    if found is None:
        found = Graft(board)
        module.__class__ = swapped(type(module), tuple(uncalled))
        module.add_module("deltaworks", found)
        module.train(module.training)
    elif uncalled:
        base, known = type(module)._deltaworks_base, type(module)._deltaworks_uncalled  # type: ignore[attr-defined]
        module.__class__ = swapped(base, tuple(dict.fromkeys((*known, *uncalled))))
    return found


def still(model: nn.Module, board: Switchboard) -> None:
    """Let norms with running statistics use those of the base, for training as for use, and not move them.

    They are no parameters: an adapter does not hold them, and without them it would act on another model. A graft
    that need not hold any part does it, which keeps the mode that the norm would be in.
    """
    for module in list(model.modules()):
        if has_statistics(module):
            graft(module, board)


def introduce(model: nn.Module, sites: Iterable[Site]) -> None:
    """Make the grafts of layers that read one tensor known to each other."""
    readers: dict[int, list[Graft]] = {}
    for site in sites:
        found = graft_of(model.get_submodule(site.path)) if site.reads is not None else None
        if found is not None and site.reads is not None:
            group = readers.setdefault(site.reads, [])
            group += [] if found in group else [found]
    for group in readers.values():
        for place, found in enumerate(group):
            found.followers = group[place + 1 :]


def ungraft(module: nn.Module) -> None:
    """Set the module's class back and drop its graft."""
    mode = module._modules["deltaworks"].training  # type: ignore[union-attr]
    module.__class__ = type(module)._deltaworks_base  # type: ignore[attr-defined]
    del module._modules["deltaworks"]
    if has_statistics(module):
        module.training = mode


def vacate(module: nn.Module) -> None:
    """Drop a graft that holds no part any more, unless it keeps a norm still."""
    found = graft_of(module)
    if found is not None and not found._modules and not has_statistics(module):
        ungraft(module)
