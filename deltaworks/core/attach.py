"""Attach, switch, merge, detach.

The state of a model, which adapters it has, which act, what the base's flags were, is one plain object on the model;
the parts hang at their modules. Everything is found by path, so a copied or unpickled model is as good as the first.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..model.anatomy import Anatomy, Site, describe
from ..model.kinds import GRAFT
from ..model.weights import Weight, consumes, is_quantised, keep_differentiable
from .experts import PerExpert, setting
from .graft import Switchboard, graft, graft_of, introduce, still, ungraft, vacate
from .method import Batches, Method, Placed, weight_at
from .operators.low_rank import LowRank
from .part import Delta, Part, Shared, Trained, in_place

if TYPE_CHECKING:
    from .tuned import Tuned

MERGED_AT_ONCE = 1 << 20
"""Values of a parameter that a product of factors is added to at a time."""
ALIGNED = 64
"""Bytes whose multiples are the places where torch puts tensors on a CPU."""


@dataclass
class Adapter:
    """One adapter's record: method, its parts' places in order, the modules they borrow from, what `freeze` froze.

    `seed` is what `attach` drew the initial values with, None where it took the global generator or is not known.
    """

    method: Method
    places: list[tuple[str, str]]
    shared: dict[str, Shared] = field(default_factory=dict)
    frozen: set[str] = field(default_factory=set)
    seed: int | None = None


@dataclass
class State:
    """Everything Deltaworks knows of a model beside the parts themselves; `untied` says how it was merged."""

    board: Switchboard = field(default_factory=Switchboard)
    adapters: dict[str, Adapter] = field(default_factory=dict)
    flags: dict[str, bool] = field(default_factory=dict)
    untied: bool = False


def find_state(model: nn.Module) -> State | None:
    """The model's state, None when nothing was ever attached."""
    return model.__dict__.get("_deltaworks")


def state_of(model: nn.Module) -> State:
    """The model's state.

    Raises:
        ValueError: when nothing is attached.
    """
    state = find_state(model)
    if state is None:
        raise ValueError(f"{type(model).__name__} has no adapter; attach one with dw.attach(model, dw.LoRA())")
    return state


def named_parts(model: nn.Module, name: str) -> Iterator[tuple[str, Part]]:
    """`<module path>.<label>` and part of an adapter, in order of attachment."""
    for path, tag in state_of(model).adapters[_known(model, name)].places:
        found = graft_of(model.get_submodule(path))
        assert found is not None
        part = found.get_submodule(name).get_submodule(tag)
        assert isinstance(part, Part)
        yield (f"{path}.{tag}" if path else tag), part


def attach(
    model: nn.Module,
    method: Method,
    *,
    name: str = "default",
    data: Batches | None = None,
    also: object = None,
    seed: int | None = None,
) -> Tuned:
    """Put a method's parts into a model, in place, and freeze the rest.

    Args:
        model: any module; a Hugging Face model can be addressed by role.
        method: what to attach, for example `LoRA(rank=16)`.
        name: the adapter's name; a model can hold several, the new one acts together with those active.
        data: for methods that measure first, batches as the model is called (dictionaries of tensors).
        also: sites (as `on=`) whose own parameters are trained and saved as well, such as a new classification head.
        seed: fixes the initial values; None takes the global generator as it is.

    Returns:
        A handle on the adapter.

    Raises:
        ValueError: when the name is taken or unfit, nothing matches, or data is missing. The model is then unchanged.
    """
    state = find_state(model) or State()
    _check_name(name, state)
    if state.board.merged:
        raise ValueError(f"{', '.join(state.board.merged)} is merged into the base; call dw.unmerge(model) first")
    base = describe(model)
    measured = None
    if method.needs_data:
        if data is None:
            raise ValueError(
                f"{method.slug} measures the model before it attaches; give batches: attach(..., data=batches)"
            )
        measured = method.measure(base, data)
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs' generators as well
        shared = method.shared(base)
        placed = list(method.parts(base, shared, measured))
    if not placed:
        raise ValueError(
            f"{method.slug} found nothing to change in {type(model).__name__} (on={getattr(method, 'on', None)!r})"
        )
    if also is not None:
        taken = {(item.site.path, item.site.parameter) for item in placed if in_place(item.part, item.site)}
        for item in unfreeze(base, also):
            if (item.site.path, item.site.parameter) not in taken:
                taken.add((item.site.path, item.site.parameter))
                placed.append(item)
    handle = install(model, method, placed, shared, name=name)
    handle.state.adapters[name].seed = None if seed is None else int(seed)
    return handle


def unfreeze(base: Anatomy, on: object) -> Iterator[Placed]:
    """Parts that train the base's own parameters at some sites and below, each parameter once."""
    seen: set[int] = set()
    for site in base.select(on, what="module"):
        for path, module in base.model.get_submodule(site.path).named_modules():
            if GRAFT in path.split("."):
                continue
            for name, parameter in module._parameters.items():
                if parameter is not None and id(parameter) not in seen:
                    seen.add(id(parameter))
                    full = ".".join(part for part in (site.path, path) if part)
                    own = Site(path=full, role=site.role, kind=site.kind, parameter=name, block=site.block)
                    yield Placed(own, Trained(), f"trained_{name}")


def install(
    model: nn.Module, method: Method, placed: Sequence[Placed], shared: dict[str, Shared], *, name: str = "default"
) -> Tuned:
    """Hang finished parts into a model; `attach` and `load` end here."""
    from .tuned import Tuned

    state = find_state(model) or State()
    _check_name(name, state)
    for item in placed:
        module = model.get_submodule(item.site.path)
        stored = module._parameters.get(item.site.parameter) if item.site.parameter else None
        if (
            isinstance(item.part, Trained)
            and stored is not None
            and (is_quantised(stored) or not stored.is_floating_point())
        ):
            raise ValueError(
                f"{item.site.path}.{item.site.parameter} is quantised and cannot be trained itself; "
                "load the base unquantised, or take a method that adds to it, such as lora"
            )
    _refuse_apart(model, method, placed)
    keep_differentiable(model)
    _tell_of_dropout(model, placed)
    # Whatever can fail comes before the model is touched.
    for item in placed:
        _home(item.part, model, item.site)
        item.part.site = item.site
        if isinstance(item.part, Delta) and item.site.parameter:
            item.part.settle(weight_at(model, item.site))
    if not state.adapters:
        state.flags = {path: parameter.requires_grad for path, parameter in model.named_parameters()}
        model.requires_grad_(False)
        model.__dict__["_deltaworks"] = state
        still(model, state.board)
    places = []
    for item in placed:
        module = model.get_submodule(item.site.path)
        uncalled = [item.site.parameter] if not item.site.called and item.site.parameter else []
        found = graft(module, state.board, uncalled)
        found.add(name, item.label, item.part)
        item.part.train(found.training)
        places.append((item.site.path, item.label))
        if isinstance(item.part, Trained):
            parameter = module.get_parameter(item.site.parameter or "weight")
            item.part.enter(parameter)
            parameter.requires_grad_(True)
    introduce(model, describe(model).sites)
    state.adapters[name] = Adapter(method, places, shared)
    state.board.active = (*state.board.active, name)
    return Tuned(model, name)


def _tell_of_dropout(model: nn.Module, placed: Sequence[Placed]) -> None:
    """Warn of dropout where a change enters through the weight as a whole, and no input is there to drop from."""
    deaf = []
    for item in placed:
        part = item.part
        # Masked copies in a stack have it among the settings of what they copy.
        copied = setting(part, "inner") if isinstance(part, PerExpert) else None
        drops = setting(part, "dropout") or (isinstance(copied, dict) and copied.get("dropout"))
        if isinstance(part, Delta) and drops:
            kind = consumes(model.get_submodule(item.site.path))
            special = {"embedding": "look_up", "convolution": "convolve"}.get(kind, "")
            heard = part.lean if kind == "linear" else hasattr(part, special)
            if not (heard and item.site.called and item.site.kind != "experts"):
                deaf.append(item.site.name)
    if deaf:
        warnings.warn(
            f"dropout does not act at {len(deaf)} places, the first {deaf[0]}: there the weight is changed as a whole "
            "and the layer's input is not seen",
            stacklevel=4,
        )


def _home(part: Part, model: nn.Module, site: Site) -> None:
    """Move a part to its module's device; trainable tensors in at least float32, as optimizers need."""
    like = _beside(model, site)
    if like is None:
        return
    if any(tensor.device != like.device for tensor in (*part.parameters(), *part.buffers())):
        part.to(device=like.device)
    wanted = torch.float64 if like.dtype == torch.float64 else torch.float32
    for child in part.modules():
        for tensor in (*child._parameters.values(), *child._buffers.values()):
            if tensor is not None and tensor.is_floating_point() and tensor.dtype != wanted:
                tensor.data = tensor.data.to(wanted)
            # A factor from a decomposition may lie in columns, one from a file at any byte. Products of the same values
            # in another order or place may round otherwise, and what is loaded must compute what was saved.
            if isinstance(tensor, nn.Parameter) and not (tensor.is_contiguous() and tensor.data_ptr() % ALIGNED == 0):
                tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)


def _beside(model: nn.Module, site: Site) -> Tensor | None:
    """A parameter that lives where the site does; None in a model without any."""
    path = site.path
    own = model.get_submodule(path)._parameters.get(site.parameter) if site.parameter else None
    like = own if own is not None else next(model.get_submodule(path).parameters(), None)
    while like is None and path:  # a dropout or an activation lives where its surroundings do
        path = path.rpartition(".")[0]
        like = next(model.get_submodule(path).parameters(), None)
    return like


def _refuse_apart(model: nn.Module, method: Method, placed: Sequence[Placed]) -> None:
    """Tensors that parts share are on one device, so the layers that use them must be."""
    homes: dict[str, set[str]] = {}
    for item in placed:
        for key in item.part.borrowed:
            lent: nn.Module = getattr(item.part, key)
            like = _beside(model, item.site)
            if like is not None and any(True for _ in (*lent.parameters(), *lent.buffers())):
                homes.setdefault(key, set()).add(str(like.device))
    for key, devices in homes.items():
        if len(devices) > 1:
            raise ValueError(
                f"{method.slug} shares its {key} among layers on {' and '.join(sorted(devices))}; load the base on one "
                "device, or take a method whose layers share nothing, such as lora"
            )


def _check_name(name: str, state: State) -> None:
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", name) or hasattr(nn.Module, name) or name in ("board", "backup"):
        raise ValueError(
            f"an adapter cannot be called {name!r}; take letters, digits, - and _, beginning with a letter"
        )
    if name in state.adapters:
        raise ValueError(f"the model already has an adapter {name!r}; detach it first or give another name")


def _known(model: nn.Module, name: str) -> str:
    adapters = state_of(model).adapters
    if name not in adapters:
        raise ValueError(f"the model has no adapter {name!r}; it has {', '.join(adapters)}")
    return name


def tuned(model: nn.Module, name: str | None = None) -> Tuned:
    """The handle of an adapter (of the last one attached, without a name)."""
    from .tuned import Tuned

    return Tuned(model, _known(model, name) if name is not None else list(state_of(model).adapters)[-1])


def activate(model: nn.Module, names: str | Sequence[str] | None) -> None:
    """Switch: let these adapters act, in this order (their changes add up); None or an empty list for none."""
    state = state_of(model)
    chosen = () if names is None else (names,) if isinstance(names, str) else tuple(names)
    for name in chosen:
        _known(model, name)
    if state.board.merged:
        raise ValueError(f"{', '.join(state.board.merged)} is merged into the base; call dw.unmerge(model) first")
    # Within `disable` nothing of theirs is in the model; its end puts in what is active then.
    if chosen != state.board.active and state.board.enabled:
        _leave(model, state.board.active)
        _enter(model, chosen)
    state.board.active = chosen


def _enter(model: nn.Module, names: Sequence[str]) -> None:
    """Put the adapters' own values of base parameters into the model; of one parameter the last adapter's counts."""
    for name in names:
        for part, parameter in _trained(model, name):
            part.enter(parameter)


def _leave(model: nn.Module, names: Sequence[str]) -> None:
    """Take them out again, in the opposite order: each gives back what it found."""
    for name in reversed(names):
        for part, parameter in _trained(model, name):
            part.leave(parameter)


def _trained(model: nn.Module, name: str) -> Iterator[tuple[Trained, nn.Parameter]]:
    for _, part in named_parts(model, name):
        if isinstance(part, Trained):
            yield part, model.get_submodule(part.site.path).get_parameter(part.site.parameter or "weight")


@contextlib.contextmanager
def disable(model: nn.Module) -> Iterator[nn.Module]:
    """Within the block the model is its base, bit for bit."""
    state = find_state(model)
    if state is None or not state.board.enabled:
        yield model
        return
    merged = state.board.merged
    if merged:
        unmerge(model)
    state.board.enabled = False
    _leave(model, state.board.active)
    try:
        yield model
    finally:
        state.board.enabled = True
        _enter(model, state.board.active)
        if merged:
            merge(model, untie=state.untied)


@contextlib.contextmanager
def route(model: nn.Module, names: Sequence[str | None]) -> Iterator[nn.Module]:
    """Within the block every example of the batch has its own adapter (None: the base).

    Raises:
        ValueError: for an unknown adapter, one that trains the base's own parameters, or one that changes weights
            which are read without calling their layer.
    """
    state = state_of(model)
    for name in dict.fromkeys(names):
        if name is not None and any(isinstance(part, Trained) for _, part in named_parts(model, name)):
            raise ValueError(f"adapter {name!r} replaces parameters of the base and cannot be chosen per example")
        uncalled = [full for full, part in named_parts(model, name) if not part.site.called] if name is not None else []
        if uncalled:
            raise ValueError(
                f"adapter {name!r} cannot be chosen per example: {uncalled[0]} changes a weight that the model reads "
                "for the whole batch; run it in a batch of its own"
            )
    before, active = state.board.routing, state.board.active
    activate(model, [])
    state.board.routing = tuple(names)
    try:
        yield model
    finally:
        state.board.routing = before
        activate(model, active)


def freeze(model: nn.Module, name: str) -> None:
    """Stop training an adapter; it goes on acting."""
    frozen = state_of(model).adapters[_known(model, name)].frozen
    for full, parameter in _own_parameters(model, name):
        if parameter.requires_grad:
            parameter.requires_grad_(False)
            frozen.add(full)


def unfreeze_adapter(model: nn.Module, name: str) -> None:
    """Train an adapter again: exactly the tensors its method trains."""
    frozen = state_of(model).adapters[_known(model, name)].frozen
    for full, parameter in _own_parameters(model, name):
        if full in frozen:
            parameter.requires_grad_(True)
    frozen.clear()


def _own_parameters(model: nn.Module, name: str) -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter of an adapter by a name that copies and shards of the model share."""
    for full, part in named_parts(model, name):
        if isinstance(part, Trained):
            yield full, model.get_submodule(part.site.path).get_parameter(part.site.parameter or "weight")
        else:
            yield from ((f"{full}.{inner}", parameter) for inner, parameter in part.named_parameters())


def merge(model: nn.Module, *, untie: bool = False) -> nn.Module:
    """Fold the active adapters into the base's parameters; `unmerge` gives the parameters back bit for bit.

    Args:
        untie: give a tied parameter (embedding and head in one) a copy of its own where only one side was adapted.

    Raises:
        ValueError: when a method cannot be folded, or a weight is quantised or tied. The model is then unchanged.
    """
    state = state_of(model)
    if state.board.merged:
        return model
    if not state.board.enabled:
        raise ValueError("adapters that are switched off cannot be merged; leave the disable(...) block first")
    if state.board.routing is not None:
        raise ValueError("adapters chosen per example cannot be merged; leave the route(...) block first")
    changes = _changes(model, state, untie)
    with torch.no_grad():
        # A change of a bias may depend on the weight, so all are made before any is written.
        new = []
        for path, parameter, deltas in changes:
            module = model.get_submodule(path)
            new.append((module, parameter, _merged(module, parameter, module._parameters[parameter], deltas)))
        for module, parameter, value in new:
            found = graft_of(module)
            assert found is not None
            if parameter not in found.backup:
                found.backup[parameter] = module._parameters[parameter]
            module._parameters[parameter] = value
    state.board.merged, state.untied = state.board.active, untie
    return model


def _changes(model: nn.Module, state: State, untie: bool) -> list[tuple[str, str, list[Delta]]]:
    """What merging would write: module path, parameter, deltas in order; all refusals happen here."""
    by_place: dict[tuple[str, str], list[Delta]] = {}
    shares: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                shares[id(parameter)] = shares.get(id(parameter), 0) + 1
    for name in state.board.active:
        method = state.adapters[name].method
        for full, part in named_parts(model, name):
            if isinstance(part, Trained):
                continue
            if not part.mergeable or not isinstance(part, Delta) or not method.mergeable:
                raise ValueError(
                    f"{method.slug} cannot be merged: {type(part).__name__} at {full} is no fixed change of a weight; "
                    "keep the adapter beside the base"
                )
            module = model.get_submodule(part.site.path)
            stored = module._parameters.get(part.site.parameter or "weight")
            if stored is not None and is_quantised(stored):
                raise ValueError(
                    f"{part.site.path} is quantised and cannot take a merged change; load the base unquantised to merge"
                )
            if stored is not None and shares[id(stored)] > 1 and not untie:
                raise ValueError(
                    f"{part.site.path}.{part.site.parameter} is tied to another module, which merging would change as "
                    "well; merge(model, untie=True) gives it a copy of its own"
                )
            by_place.setdefault((part.site.path, part.site.parameter or "weight"), []).append(part)
    folding_bias = {
        path
        for (path, parameter), deltas in by_place.items()
        if parameter == "weight" and any(type(delta).fold_bias is not Delta.fold_bias for delta in deltas)
    }
    for path in folding_bias:
        if (path, "bias") in by_place or model.get_submodule(path)._parameters.get("bias") is not None:
            by_place[path, "bias"] = by_place[path, "weight"] + by_place.get((path, "bias"), [])
    changes = [(path, parameter, deltas) for (path, parameter), deltas in by_place.items()]
    return changes


def _merged(
    module: nn.Module, parameter: str, stored: torch.Tensor | None, deltas: Sequence[Delta]
) -> nn.Parameter | None:
    """The parameter with the deltas folded in, in at least float32 and rounded once."""
    view = Weight(module, parameter)
    value = view.matrix() if stored is None else view.canonical(stored.detach())
    if value.dim() == 2 and all(_adds_a_product(delta, parameter) for delta in deltas):
        new = view.layout(_with_products(value, deltas)).contiguous()
        return nn.Parameter(new, requires_grad=False)
    target = value.dtype
    value = value.to(torch.promote_types(value.dtype, torch.float32))
    for delta in deltas:
        change: Callable[[torch.Tensor], torch.Tensor | None] = delta.fold
        if delta.site.parameter != parameter:
            change = delta.fold_bias
        part = Weight(module, parameter, delta.site.rows)
        chosen = value if delta.site.rows is None else value.index_select(-2 if value.dim() > 1 else 0, part.index())
        folded = change(chosen)
        value = value if folded is None else part.replaced(folded, value)
    new = view.layout(value).to(target).contiguous()
    return nn.Parameter(new, requires_grad=False)


def _adds_a_product(delta: Delta, parameter: str) -> bool:
    """Whether the delta adds one product of factors to the whole parameter, nothing else."""
    plain = type(delta) is LowRank and delta.a0 is None and delta.a.dtype == torch.float32
    return plain and delta.site.rows is None and delta.site.parameter == parameter


def _with_products(value: torch.Tensor, deltas: Sequence[Delta]) -> torch.Tensor:
    """`value` with products added in at least float32, some rows at a time: what is wide stays in the cache."""
    new, step = torch.empty_like(value), max(1, MERGED_AT_ONCE // value.shape[1])
    for start in range(0, value.shape[0], step):
        rows = slice(start, start + step)
        piece = value[rows].to(torch.promote_types(value.dtype, torch.float32), copy=True)
        for delta in deltas:
            assert isinstance(delta, LowRank)
            piece.addmm_(delta.b[rows].to(piece.dtype), delta.a.to(piece.dtype), alpha=delta.scale)
        new[rows] = piece
    return new


def unmerge(model: nn.Module) -> nn.Module:
    """Give the base its own parameters back, bit for bit; the adapters act beside it again."""
    state = state_of(model)
    for module in model.modules():
        found = graft_of(module)
        if found is not None:
            for parameter, stored in found.backup.items():
                module._parameters[parameter] = stored  # type: ignore[assignment]
            found.backup.clear()
    state.board.merged = ()
    return model


def detach(model: nn.Module, name: str | None = None) -> nn.Module:
    """Take an adapter (or all) out; with the last one gone the model is the base bit for bit, flags and classes too."""
    state = find_state(model)
    if state is None:
        return model
    names = list(state.adapters) if name is None else [_known(model, name)]
    if state.board.merged:
        unmerge(model)
    active = tuple(one for one in state.board.active if one not in names)
    _leave(model, state.board.active)
    kept = {id(parameter) for one in state.adapters if one not in names for _, parameter in _trained(model, one)}
    for one in names:
        for _, parameter in _trained(model, one):
            parameter.requires_grad_(id(parameter) in kept and parameter.requires_grad)
        for path, _ in state.adapters[one].places:
            module = model.get_submodule(path)
            found = graft_of(module)
            if found is not None and one in found._modules:
                del found._modules[one]
                vacate(module)
        del state.adapters[one]
    if state.board.enabled:
        _enter(model, active)
    state.board.active = active
    if not state.adapters:
        for module in list(model.modules()):
            if graft_of(module) is not None:
                ungraft(module)
        for path, parameter in model.named_parameters():
            if path in state.flags:
                parameter.requires_grad_(state.flags[path])
        del model.__dict__["_deltaworks"]
    return model


def _ends(model: nn.Module) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The weights of a transformers model's head and embedding."""
    ends = []
    for name in ("get_output_embeddings", "get_input_embeddings"):
        try:
            layer = getattr(model, name)()
        except (AttributeError, NotImplementedError):
            layer = None
        ends.append(layer._parameters.get("weight") if isinstance(layer, nn.Module) else None)
    return ends[0], ends[1]


def bake(model: nn.Module, *, untie: bool = False) -> nn.Module:
    """Merge for good: the changes stay in the parameters, every trace of the adapters goes."""
    state = state_of(model)
    head, embedding = _ends(model)
    tied = head is not None and head is embedding
    merge(model, untie=untie)
    head, embedding = _ends(model)
    if tied and head is not embedding:
        model.config.tie_word_embeddings = False  # type: ignore[union-attr]  # or loading would tie them again
    for module in list(model.modules()):
        found = graft_of(module)
        if found is not None:
            found.backup.clear()
            for parts in found.children():
                for part in parts.children():
                    if isinstance(part, Trained):
                        part.pristine = None
            ungraft(module)
    for path, parameter in model.named_parameters():
        parameter.requires_grad_(state.flags.get(path, True))
    del model.__dict__["_deltaworks"]
    return model
