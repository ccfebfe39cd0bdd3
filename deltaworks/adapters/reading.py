"""Deltaworks' own format, read: every entry of `adapter.json` is checked and becomes a part at a site of the model."""

from __future__ import annotations

import dataclasses
import functools
import inspect as introspect
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ..core import registry
from ..core.method import Method, Placed
from ..core.part import PARTS, Delta, Module, Part, Shared, Trained, Wrapper
from ..model.anatomy import Site, describe
from ..model.weights import Weight
from . import starts
from .files import CONFIG, WEIGHTS, refuse, twice
from .native import FORMAT, Values, signature, tensor_name
from .sites import check_fit, find_site


@dataclass(frozen=True)
class Plan:
    """A verified adapter, ready to be hung into the model it was read for; `seed` is the one it was attached with."""

    method: Method
    placed: list[Placed]
    shared: dict[str, Shared]
    seed: int | None = None


class Reader:
    """Makes an adapter for one model from the content of the two files.

    Every fault is a `ValueError` that begins with the file's name. The model is only looked at.
    """

    def __init__(self, model: nn.Module, folder: Path, config: dict[str, Any], values: Values) -> None:
        self.model, self.config = model, config
        self.file, self.weights = folder / CONFIG, folder / WEIGHTS
        self.left = dict(values)
        self.base = describe(model)

    def plan(self) -> Plan:
        """The verified adapter.

        Raises:
            ValueError: for anything that is not what an adapter for this model holds.
        """
        check_head(self.file, self.config)
        method, seed = self.method(), self.seed()
        shared = {key: self.lent(key, item) for key, item in self.of_kind(self.config, "shared", dict).items()}
        written = self.of_kind(self.config, "parts", list)
        if not written:
            refuse(self.file, "has no parts")
        placed = [self.placed(item, shared) for item in written]
        if again := twice((item.site.path, item.label) for item in placed):
            refuse(self.file, f"two parts are called {again[1]!r} at {again[0]!r}")
        if self.left:
            refuse(self.weights, f"holds tensors that no part has: {', '.join(sorted(self.left)[:3])}")
        return Plan(method, placed, shared, seed)

    def of_kind(self, owner: Any, key: str, kind: type | tuple[type, ...]) -> Any:
        """A value of the JSON, which must be of one of these Python types."""
        if not isinstance(owner, dict) or key not in owner:
            refuse(self.file, f"an entry has no {key!r}")
        if not isinstance(owner[key], kind):
            found = owner[key]
            refuse(self.file, f"{key!r} cannot be {type(found).__name__} {str(found)[:60]!r}")
        return owner[key]

    def method(self) -> Method:
        """The method with its hyper-parameters, every one checked."""
        settings = self.of_kind(self.config, "settings", dict)
        try:
            cls = registry.find(self.of_kind(self.config, "method", str))
            fields = {item.name: item for item in dataclasses.fields(cls) if item.init}
            for name in settings:
                if name not in fields:
                    raise ValueError(f"{cls.slug} has no hyper-parameter {name!r}; it has {', '.join(fields)}")
            return cls(**{name: self.restored(value, fields[name].default) for name, value in settings.items()})
        except Exception as error:  # whatever a page's own checks make of a hostile value
            refuse(self.file, error)

    def seed(self) -> int | None:
        """What the initial values were drawn with, where the file says it."""
        seed = self.config.get("seed")
        if seed is not None and (type(seed) is not int or not -(1 << 63) <= seed < 1 << 64):
            refuse(self.file, f"'seed' cannot be {str(seed)[:60]!r}; it is a whole number of 64 bits, or none")
        return seed

    @functools.cached_property
    def starts(self) -> dict[tuple[str, str], Values]:
        """What the method starts from on this base, by module and label."""
        return starts.again(self.model, self.method(), self.seed())

    def started(self, item: dict[str, Any], tensors: Values) -> Values:
        """The tensors of a part with the start that was left out, which must be the one the file means."""
        mark = self.of_kind(item, "start", str)
        if starts.start_of(tensors):
            raise ValueError("the file holds the start that it says was left out")
        found = starts.as_kept(self.starts.get((item["path"], item["label"]), {}), tensors)
        if not found or starts.digest(found) != mark:
            raise ValueError(
                "the start that was left out is another on this base, device or machine; load it where it was made, or "
                'save it there with start="values"'
            )
        return tensors | found

    def restored(self, value: Any, default: Any) -> Any:
        """A hyper-parameter as the method declares it: module types found in the model, tuples where lists stand."""
        if isinstance(value, dict) and set(value) == {"type"}:
            if not isinstance(value["type"], str) or value["type"] not in self.types:
                raise ValueError(f"{type(self.model).__name__} has no module of type {value['type']!r}")
            return self.types[value["type"]]
        if isinstance(value, list):
            restored = [self.restored(item, None) for item in value]
            return tuple(restored) if isinstance(default, tuple) else restored
        return value

    @functools.cached_property
    def types(self) -> dict[str, type]:
        """The classes of the model's modules, and those they are made of, by their full names."""
        classes = {cls for module in self.model.modules() for cls in type(module).__mro__}
        return {f"{cls.__module__}.{cls.__qualname__}": cls for cls in classes}

    def lent(self, key: str, item: Any) -> Shared:
        """A module that several parts borrow from."""
        kind, settings = self.of_kind(item, "kind", str), self.of_kind(item, "settings", dict)
        cls = Shared.kinds.get(kind)
        if cls is None:
            refuse(self.file, f"{key!r} is of the unknown kind {kind!r}")
        tensors = self.taken(f"@{key}.", item)
        try:
            check_settings(cls, settings, set(cls.settings))
            with FakeTensorMode():
                sketch = cls(**settings)
            need = sum(value.numel() for value in (*sketch.parameters(), *sketch.buffers()))
            if need > (limit := 4 * sum(p.numel() for p in self.model.parameters()) + (1 << 26)):
                raise ValueError(f"would take {need:,} values; a base of this size can need {limit:,}")
            module = cls(**settings)
            wanted = module.state_dict()
            compare(kind, wanted, tensors)
            module.load_state_dict(tensors, strict=False, assign=True)
        except Exception as error:
            refuse(self.file, f"{key}: {error}")
        return module

    def placed(self, item: Any, shared: dict[str, Shared]) -> Placed:
        """One part at its site."""
        path, label, kind = (self.of_kind(item, key, str) for key in ("path", "label", "kind"))
        parameter = self.of_kind(item, "parameter", (str, type(None)))
        part_name = self.of_kind(item, "part", (str, type(None)))
        cls = PARTS.get(kind)
        if cls is None or cls in (Part, Delta, Module, Wrapper):
            refuse(self.file, f"{path!r} has a part of the unknown kind {kind!r}")
        if not label.isidentifier() or hasattr(nn.Module(), label):
            refuse(self.file, f"a part at {path!r} cannot be called {label!r}")
        settings = self.of_kind(item, "settings", dict)
        prefix = tensor_name(path, label, parameter, "" if cls is Trained else "*").removesuffix("*")
        tensors = self.taken(prefix, item)
        try:
            site = self.site(find_site(self.base, path, parameter, part_name), item)
            if "start" in item:
                tensors = self.started(item, tensors)
            part = self.trained(tensors) if cls is Trained else remade(cls, settings, tensors, shared)
            check_fit(part, site, self.model)
        except Exception as error:
            refuse(self.file, f"{path or 'model'}, {label}: {error}")
        return Placed(site, part, label)

    def site(self, site: Site, item: dict[str, Any]) -> Site:
        """The site with the rows the file names, where it names any."""
        if "rows" not in item:
            return site
        rows = item["rows"]
        if rows is None:
            return dataclasses.replace(site, rows=None)
        module = self.model.get_submodule(site.path)
        size = Weight(module, site.parameter or "weight").fan_out
        if not isinstance(rows, list) or not all(type(row) is int and 0 <= row < size for row in rows) or not rows:
            raise ValueError(f"rows must be a list of whole numbers below {size}")
        if len(set(rows)) < len(rows):
            raise ValueError("rows names a row twice")
        return dataclasses.replace(site, rows=tuple(rows))

    def taken(self, prefix: str, item: dict[str, Any]) -> Values:
        """The tensors of one owner, out of those that are left; dtypes and shapes must be those the JSON says."""
        taken: Values = {}
        for inner, wanted in self.of_kind(item, "tensors", dict).items():
            value = self.left.pop(prefix + inner, None)
            if value is None:
                refuse(self.weights, f"has no tensor {prefix + inner!r}")
            if signature(value) != wanted:
                refuse(self.weights, f"{prefix + inner} is {signature(value)}, where {CONFIG} says {wanted}")
            taken[inner] = value
        return taken

    def trained(self, tensors: Values) -> Trained:
        """A parameter of the base with its learned value."""
        if set(tensors) != {""} or not tensors[""].is_floating_point():
            raise ValueError("a trained parameter has one value, of floating point")
        part = Trained()
        part.learned = tensors[""]
        return part


def check_head(file: Path, config: dict[str, Any]) -> None:
    """Whether the JSON says of itself that it is ours, in a version we know."""
    version = config.get("format")
    if type(version) is not int or "method" not in config:
        refuse(file, "does not describe a Deltaworks adapter: no format or no method")
    if version != FORMAT:
        refuse(file, f"is of format {version}; this library reads {FORMAT}. Install a newer deltaworks")
    base = config.get("base")
    mark = base.get("fingerprint") if isinstance(base, dict) else None
    if not isinstance(mark, str) or mark.count(":") != 1:
        refuse(file, "does not say which base it belongs to: no base.fingerprint")


def remade(cls: type[Part], settings: dict[str, Any], tensors: Values, shared: dict[str, Shared]) -> Part:
    """A part made again from a file's settings and tensors, with the modules it borrows.

    Raises:
        ValueError: when it cannot be made of them.
    """
    check_settings(cls, settings, set(cls.settings))
    inner, described = cls, settings
    while "kind" in inner.settings and isinstance(described.get("kind"), str):
        inner, described = PARTS.get(described["kind"], Part), described.get("inner") or {}
    missing = [key for key in inner.borrowed if key not in shared]
    if missing:
        raise ValueError(f"{cls.__name__} borrows {missing[0]!r}, which the file does not describe")
    part = cls.remade(settings, tensors, {key: shared[key] for key in inner.borrowed})
    compare(cls.__name__, part.tensors(), tensors)
    return part


def compare(owner: str, wanted: Values, tensors: Values) -> None:
    """Whether the tensors are those the owner has, in name, shape and kind of number."""
    if set(wanted) != set(tensors):
        raise ValueError(f"{owner} has tensors {sorted(wanted)}, the file {sorted(tensors)}")
    for name, value in tensors.items():
        if value.shape != wanted[name].shape:
            raise ValueError(f"{owner}.{name} has shape {list(wanted[name].shape)}, the file {list(value.shape)}")
        if value.is_floating_point() != wanted[name].is_floating_point():
            raise ValueError(f"{owner}.{name} has dtype {wanted[name].dtype}, the file {value.dtype}")


def check_settings(cls: type, settings: dict[str, Any], wanted: set[str]) -> None:
    """Whether plain constructor arguments are there, of the declared types, and no sizes out of all proportion.

    Raises:
        ValueError: naming the argument.
    """
    if set(settings) != wanted:
        raise ValueError(f"{cls.__name__} has settings {sorted(wanted)}, the file {sorted(settings)}")
    hints = _hints(cls)
    for name, value in settings.items():
        hint = hints.get(name, Any)
        kinds = set(get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,))
        if float in kinds:
            kinds.add(int)
        if kinds <= {int, float, bool, str, type(None)} and type(value) not in kinds:
            wanted_type = introspect.formatannotation(hint)
            raise ValueError(f"{cls.__name__}: {name}={value!r} is not allowed; it must be {wanted_type}")
        if type(value) is int and "seed" not in name and abs(value) >= 1 << 32:
            raise ValueError(f"{cls.__name__}: {name}={value} is out of range")
        if name == "dropout" and not (isinstance(value, (int, float)) and 0 <= value < 1):
            raise ValueError(f"{cls.__name__}: dropout={value!r} is not allowed; it must be at least 0 and below 1")
        if isinstance(value, dict) and "kind" not in cls.settings and not all(isinstance(key, str) for key in value):
            raise ValueError(f"{cls.__name__}: {name} is not a mapping with text keys")


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    try:
        return get_type_hints(cls.__init__)
    except NameError:  # annotations that only exist for type checkers
        return {}
