"""How `describe` finds out: blocks by repetition, layers by shape and name hints, norms and residuals by the trace."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from . import names
from .anatomy import FRESH, Anatomy, Block, Site, Stack
from .fused import ask_causal, experts_parts, gate_up_rows, qkv_rows
from .kinds import ATTENTION, base_modules, experts_shapes, is_conv, is_embedding, is_linear, is_norm, linear_shape, own
from .names import means
from .trace import Call, Key, Trace, trace


def survey(model: nn.Module) -> Anatomy:
    """Describe `model`; see `deltaworks.model.anatomy.describe`."""
    return _Survey(model).anatomy()


@dataclass
class _Core:
    """One attention in a block: the module that holds the query projection, and its layers by role."""

    path: str
    layers: dict[str, list[str]] = field(default_factory=dict)
    cross: bool = False

    def first(self, *roles: str) -> str | None:
        return next((paths[0] for role in roles if (paths := self.layers.get(role))), None)


@dataclass
class _Unit:
    """What was found in one block before it is written down as a `Block`."""

    path: str
    cores: list[_Core] = field(default_factory=list)
    mlp: dict[str, list[str]] = field(default_factory=dict)
    ssm: str | None = None
    experts: str | None = None
    router: str | None = None
    hidden: int | None = None
    pre: dict[str, str] = field(default_factory=dict)
    post: dict[str, str] = field(default_factory=dict)
    out: dict[str, str | None] = field(default_factory=dict)
    mlp_in: str | None = None
    mlp_module: str | None = None
    parallel: bool = False
    leading_norm: bool = False

    def core(self, cross: bool) -> _Core | None:
        return next((core for core in self.cores if core.cross == cross), None)


@dataclass
class _Sublayer:
    """A sub-layer's life in the trace: when it began, on which tensor, and the module that ends it."""

    name: str
    begin: int
    reads: Key | None
    last: Call


class _Survey:
    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules = dict(base_modules(model))
        self.path_of = {id(module): path for path, module in self.modules.items()}
        self.config = getattr(model, "config", None)
        self.trace: Trace = trace(model)
        self.role: dict[str, str] = {}
        self.norm_role: dict[str, str] = {}
        self.rows: dict[str, dict[str, tuple[int, ...]]] = {}
        self.uncalled: set[str] = set()
        self.asked: dict[Any, Any] = {}  # answers of modules that were run, by their class and sizes

    # The whole.

    def anatomy(self) -> Anatomy:
        containers = self._stacks()
        units = [[self._unit(path) for path in self._children(container)] for container in containers]
        blocks: list[Block] = []
        stacks: list[Stack] = []
        for container, members in zip(containers, units, strict=True):
            self._norms(container, members)
            name = self._stack_name(container, members)
            made = [self._block(unit, len(blocks) + i, name, members) for i, unit in enumerate(members)]
            blocks += made
            stacks.append(self._stack(container, name, made))
        found = Anatomy(self.model, blocks=blocks, stacks=stacks)
        self._outside(found, containers)
        found.sites = list(self._sites(blocks))
        found.unseen = self.trace.error if blocks and not self._followed(blocks) else None
        return found

    def _followed(self, blocks: list[Block]) -> bool:
        return all(self.trace.first(block.path) is not None for block in blocks)

    # Blocks: the outermost repetition whose members are themselves no repetition of such members.

    def _children(self, path: str) -> list[str]:
        return [f"{path}.{name}" if path else name for name, _ in self.modules[path].named_children()]

    def _stacks(self) -> list[str]:
        found = list(self._stacks_in("", same_class=False))
        normed = [path for path in found if all(self._has_norm(child) for child in self._children(path))]
        return normed or found

    def _stacks_in(self, path: str, *, same_class: bool) -> Iterator[str]:
        module = self.modules[path]
        if self._is_stack(path, same_class):
            inner = [deep for child in self._children(path) for deep in self._stacks_in(child, same_class=True)]
            inner = [deep for deep in inner if all(self._has_norm(child) for child in self._children(deep))]
            yield from inner or [path]
            return
        for name, _ in module.named_children():
            child = f"{path}.{name}" if path else name
            if child in self.modules:
                yield from self._stacks_in(child, same_class=same_class)

    def _is_stack(self, path: str, same_class: bool) -> bool:
        module = self.modules[path]
        if not isinstance(module, nn.ModuleList | nn.Sequential) or not len(module):
            return False
        children = self._children(path)
        if any(child not in self.modules or self._weights_in(child) < 2 for child in children):
            return False
        if not any(True for _ in self.modules[children[0]].children()):
            return False
        classes = {type(self.modules[child]) for child in children}
        return len(classes) == 1 or (not same_class and all(self._has_norm(child) for child in children))

    def _below(self, path: str) -> Iterator[tuple[str, nn.Module]]:
        prefix = f"{path}." if path else ""
        for name, module in self.modules.items():
            if name.startswith(prefix) and name != path:
                yield name, module

    def _weights_in(self, path: str) -> int:
        return sum(
            is_linear(module) or is_conv(module) or bool(experts_shapes(module)) for _, module in self._below(path)
        )

    def _has_norm(self, path: str) -> bool:
        return any(is_norm(module) for _, module in self._below(path))

    # One block.

    def _unit(self, path: str) -> _Unit:
        unit = _Unit(path)
        inside = list(self._below(path))
        linear = {name: linear_shape(module) for name, module in inside if is_linear(module)}
        unit.cores = self._cores(unit, linear)
        taken = {name for core in unit.cores for names_ in core.layers.values() for name in names_}
        unit.hidden = self._hidden(unit, inside, linear)
        taken |= self._outputs(unit, linear, taken)
        for core in unit.cores:
            self._fused_qkv(core)
        taken |= self._ssm(unit, inside, linear, taken)
        taken |= self._experts(unit, inside, linear, taken)
        rest = {name: shape for name, shape in linear.items() if name not in taken}
        for group in self._mlp_groups(unit, rest):
            roles = self._mlp_roles(group, rest, unit.hidden)
            for role, layer in roles.items():
                self.role[layer] = f"mlp.{role}"
                unit.mlp.setdefault(role, []).append(layer)
            if (fused := roles.get("gate_up")) is not None:
                around = self._get(fused.rpartition(".")[0])
                question = (type(around), linear[fused])
                if question not in self.asked:
                    self.asked[question] = gate_up_rows(around, self._get(fused), self._get(roles["down"]))
                self.rows[fused] = self.asked[question]
        for name, module in inside:
            if is_conv(module) and name not in self.role:
                self.role[name] = "conv"
        return unit

    def _get(self, path: str) -> nn.Module:
        return self.modules[path]

    def _cores(self, unit: _Unit, linear: dict[str, tuple[int, int]]) -> list[_Core]:
        cores = []
        for path, module in self._below(unit.path):
            if isinstance(module, nn.MultiheadAttention):
                self.uncalled |= {path, f"{path}.out_proj"}
                cores.append(_Core(path))
                continue
            held = [name for name in linear if name.rpartition(".")[0] == path]
            layers: dict[str, list[str]] = {}
            for name in held:
                for role, pattern in (
                    ("qkv", names.FUSED_QKV), ("query", names.QUERY), ("key", names.KEY), ("value", names.VALUE),
                    ("kv", names.KEY_VALUE), ("position", names.POSITION_KEY),
                ):  # fmt: skip
                    if means(pattern, name):
                        layers.setdefault(role, []).append(name)
                        break
            complete = "qkv" in layers or ("query" in layers and ("kv" in layers or {"key", "value"} <= set(layers)))
            if not complete:
                fused = self._unnamed_qkv(path, held, linear)
                if fused is None:
                    continue
                layers = {"qkv": [fused]}
            cores.append(_Core(path, layers))
        for core in cores:
            core.cross = self._crosses(core, unit)
            for role, layers_ in core.layers.items():
                self._name(core, role, layers_)
        return cores

    def _name(self, core: _Core, role: str, layers: Iterable[str]) -> None:
        for layer in layers:
            self.role[layer] = f"{'cross_attention' if core.cross else 'attention'}.{role}"

    def _unnamed_qkv(self, path: str, held: list[str], linear: dict[str, tuple[int, int]]) -> str | None:
        """In something like an attention, a first layer three times as wide as what a second layer reads."""
        like = ATTENTION.search(type(self.modules[path]).__name__) or _integer([self.modules[path]], names.HEADS)
        if not like or len(held) != 2:
            return None
        first, second = held
        return first if linear[first][0] == 3 * linear[second][1] else None

    def _crosses(self, core: _Core, unit: _Unit) -> bool:
        """An attention is a cross-attention when its keys are made from another tensor than its queries."""
        query = self.trace.first(core.first("query"))
        key = self.trace.first(core.first("key", "kv"))
        if query and key and query.inputs and key.inputs:
            return query.inputs[0] != key.inputs[0] and not self._from(query, key, core)
        return names.CROSS.search(core.path.removeprefix(unit.path)) is not None

    def _from(self, query: Call, key: Call, core: _Core) -> bool:
        """Whether query or key is computed in several steps (low-rank projections) from one tensor inside the core."""
        return any(len(core.layers.get(role, [])) > 1 for role in ("query", "kv"))

    def _hidden(self, unit: _Unit, inside: list[tuple[str, nn.Module]], linear: dict[str, Any]) -> int | None:
        for core in unit.cores:
            if not core.cross and (layer := core.first("query", "qkv")) is not None:
                return linear[layer][1]
            if isinstance(module := self._get(core.path), nn.MultiheadAttention):
                return module.embed_dim
        for name, module in inside:
            direct = name.rpartition(".")[0] == unit.path
            if direct and is_norm(module) and (weight := own(module).get("weight")) is not None:
                return weight.numel()
        return next((fan_in for _, fan_in in linear.values()), None)

    def _outputs(self, unit: _Unit, linear: dict[str, tuple[int, int]], taken: set[str]) -> set[str]:
        """The layer that ends each attention: in the attention module itself, else in the nearest module around it."""
        found: set[str] = set()
        for core in unit.cores:
            around = core.path
            while around.startswith(unit.path) and "output" not in core.layers:
                near = [
                    name for name, (fan_out, _) in linear.items()
                    if name.startswith(around + ".") and name not in taken | found and fan_out == unit.hidden
                ]  # fmt: skip
                named = [name for name in near if means(names.OUTPUT, name)]
                if (named or near) and around != unit.path:
                    core.layers["output"] = [(named or near)[-1 if around == core.path else 0]]
                elif around == unit.path and named:
                    core.layers["output"] = named[:1]
                if around == unit.path:
                    break
                around = around.rpartition(".")[0]
            for name in core.layers.get("output", []):
                self._name(core, "output", [name])
                found.add(name)
            for name in linear:
                if name.startswith(core.path + ".") and name not in taken | found:
                    self._name(core, "other", [name])
                    found.add(name)
        return found

    def _fused_qkv(self, core: _Core) -> None:
        layer = core.first("qkv")
        module = self._get(core.path)
        if isinstance(module, nn.MultiheadAttention):
            width = module.embed_dim
            thirds = {
                part: tuple(range(i * width, (i + 1) * width)) for i, part in enumerate(("query", "key", "value"))
            }
            self.rows[core.path] = thirds
        if layer is None:
            return
        heads, kv_heads, head_dim = self._heads(core)
        if heads and kv_heads and head_dim:
            sizes = {
                "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim,
                "fan_out": linear_shape(self._get(layer))[0],
            }  # fmt: skip
            question = (type(module), *sizes.values())
            if question not in self.asked:
                self.asked[question] = qkv_rows(self.model, layer, core.first("output"), **sizes)
            self.rows[layer] = self.asked[question]

    def _heads(self, core: _Core) -> tuple[int | None, int | None, int | None]:
        """`(heads, key-value heads, head width)`: widths of layers where they tell, attributes where they must."""
        module = self._get(core.path)
        if isinstance(module, nn.MultiheadAttention):
            return module.num_heads, module.num_heads, module.head_dim
        sources = [module, getattr(module, "config", None), self.config]
        heads, width = _integer(sources, names.HEADS), _integer(sources, names.HEAD_DIM)
        query, key, fused = core.first("query"), core.first("key"), core.first("qkv")
        output = core.first("output")
        if query is not None and len(core.layers["query"]) == 1:
            total = linear_shape(self._get(query))[0]
        elif output is not None:
            total = linear_shape(self._get(output))[1]
        else:
            return heads, _integer(sources, names.KV_HEADS) or heads, width
        if width is None or total % width or "kv" in core.layers:
            width = total // heads if heads and total % heads == 0 else None
        if width is None:
            return heads, _integer(sources, names.KV_HEADS) or heads, None
        heads = total // width
        if "kv" in core.layers:
            return heads, heads, width
        if key is not None:
            return heads, linear_shape(self._get(key))[0] // width, width
        if fused is not None and query is None:
            return heads, (linear_shape(self._get(fused))[0] // width - heads) // 2, width
        return heads, _integer(sources, names.KV_HEADS) or heads, width

    def _ssm(self, unit: _Unit, inside: list, linear: dict[str, tuple[int, int]], taken: set[str]) -> set[str]:
        """A mixer that holds a depthwise convolution, linear layers, and parameters of its own (the state's)."""
        found: set[str] = set()
        for path, module in inside:
            convs = [
                name for name, child in inside
                if name.rpartition(".")[0] == path and is_conv(child) and child.groups == child.in_channels > 1
            ]  # fmt: skip
            held = [name for name in linear if name.rpartition(".")[0] == path and name not in taken]
            if not convs or not held or not own(module):
                continue
            unit.ssm = path
            for name in convs:
                self.role[name] = "ssm.conv"
                self.uncalled.add(name)
            for index, name in enumerate(held):
                fan_out, fan_in = linear[name]
                if fan_in == unit.hidden and fan_out > fan_in and index == 0:
                    role = "in"
                elif fan_out == unit.hidden and index == len(held) - 1:
                    role = "out"
                else:
                    role = "x" if fan_in > fan_out else "dt"
                self.role[name] = f"ssm.{role}"
                calls = self.trace.first(path)
                if role == "dt" or (calls and calls.end > 0 and self.trace.first(name) is None):
                    self.uncalled.add(name)
            found |= set(held)
        return found

    def _experts(self, unit: _Unit, inside: list, linear: dict[str, tuple[int, int]], taken: set[str]) -> set[str]:
        found: set[str] = set()
        count = None
        for path, module in inside:
            if any(path.startswith(core.path + ".") for core in unit.cores):
                continue
            if shapes := experts_shapes(module):
                count = next(iter(shapes.values()))[0]
                unit.experts = unit.experts or path
                for parameter, (role, parts) in experts_parts(module, unit.hidden).items():
                    self.role[f"{path}:{parameter}"] = f"expert.{role}"
                    self.rows[f"{path}:{parameter}"] = parts
            elif isinstance(module, nn.ModuleList) and len(module) > 1:
                children = self._children(path)
                groups = [[name for name in linear if name.startswith(child + ".")] for child in children]
                if len({type(child) for child in module}) > 1 or any(len(group) < 2 for group in groups):
                    continue
                if any(self._has_norm(child) for child in children) or taken & {name for g in groups for name in g}:
                    continue
                count, unit.experts = len(module), unit.experts or path
                for group in groups:
                    for role, name in self._mlp_roles(group, linear, unit.hidden).items():
                        self.role[name] = f"expert.{role}"
                    found |= set(group)
        if unit.experts is None:
            return found
        for path, module in inside:
            weight = own(module).get("weight")
            if path in taken | found or weight is None or path.startswith(unit.experts + "."):
                continue
            fan_out = linear[path][0] if path in linear else weight.shape[0] if weight.ndim == 2 else None
            if fan_out is None or is_embedding(module) or is_conv(module):
                continue
            if fan_out == count or (fan_out == 1 and path in linear):
                self.role[path] = "router"
                found.add(path)
                if fan_out == count:
                    unit.router = path
                if path not in linear:
                    self.uncalled.add(path)
        return found

    def _mlp_groups(self, unit: _Unit, rest: dict[str, tuple[int, int]]) -> list[list[str]]:
        """Layers that stand together, and as one more group those that stand alone (as BERT's two do)."""
        groups: dict[str, list[str]] = {}
        for name in rest:
            groups.setdefault(name.rpartition(".")[0], []).append(name)
        alone = [name for group in groups.values() if len(group) == 1 for name in group]
        return [group for group in [*groups.values(), alone] if len(group) > 1 or (group is alone and len(alone) > 1)]

    def _mlp_roles(self, group: list[str], shapes: dict[str, tuple[int, int]], hidden: int | None) -> dict[str, str]:
        """`gate`, `up`, `down`, `gate_up` among the layers of one feed-forward part; empty when it is none."""
        ends = [name for name in group if shapes[name][0] == hidden]
        begins = [name for name in group if shapes[name][1] == hidden]
        named = [name for name in ends if means(names.DOWN, name)]
        squares = [name for name in ends if name not in begins]
        if not ends or not begins:
            return {}
        down = (squares or named or ends)[-1]
        begins = [name for name in begins if name != down]
        inner = shapes[down][1]
        if len(begins) == 1 and shapes[begins[0]][0] == 2 * inner:
            return {"gate_up": begins[0], "down": down}
        begins = [name for name in begins if shapes[name][0] == inner]
        if len(begins) == 1:
            return {"up": begins[0], "down": down}
        if len(begins) != 2:
            return {}
        gate = self._activated(begins) or next((name for name in begins if means(names.GATE, name)), begins[0])
        up = next(name for name in begins if name != gate)
        return {"gate": gate, "up": up, "down": down}

    def _activated(self, layers: list[str]) -> str | None:
        """Which of the layers is the one whose output goes through the activation, if the activation is a module."""
        for name in layers:
            call = self.trace.first(name)
            if call is None or call.end < 0:
                continue
            around = self.trace.within(name.rpartition(".")[0])
            for other in around:
                module = self.modules.get(other.path)
                if other.start < call.end or module is None or other.inputs[:1] != call.outputs[:1]:
                    continue
                if not own(module) and not isinstance(module, nn.Identity | nn.Dropout):
                    return name
        return None

    # Norms, outputs and inputs of sub-layers.

    def _norms(self, container: str, units: list[_Unit]) -> None:
        for unit in units:
            if self.trace.first(unit.path) is None or not self._follow(unit):
                self._guess(unit)
        pre_norm = any(unit.leading_norm for unit in units)
        for unit in units:
            if not pre_norm:
                for name, path in unit.post.items():
                    unit.pre.setdefault(name, path)
                unit.post = {name: path for name, path in unit.post.items() if unit.pre.get(name) != path}
            unit.leading_norm = pre_norm
            if unit.ssm:
                self.norm_role |= {path: "ssm.inner_norm" for path, m in self._below(unit.ssm) if is_norm(m)}
            for name, path in unit.post.items():
                self.norm_role[path] = f"{name}.post_norm"
            for name, path in reversed(list(unit.pre.items())):
                self.norm_role[path] = f"{name}.norm"
            for core in unit.cores:
                for path, module in self._below(core.path):
                    if is_norm(module) and path not in self.norm_role:
                        which = "query" if re.search(r"(^|_)q", path.rpartition(".")[2]) else "key"
                        self.norm_role[path] = f"{'cross_attention' if core.cross else 'attention'}.{which}_norm"

    def _sublayers(self, unit: _Unit) -> list[_Sublayer]:
        found = []
        for core in unit.cores:
            begin = self.trace.first(core.first("query", "qkv") or core.path)
            end = self.trace.first(core.first("output") or core.path) or self.trace.first(core.path)
            if begin and end and end.end > 0:
                name = "cross_attention" if core.cross else "attention"
                found.append(_Sublayer(name, begin.start, next(iter(begin.inputs), None), end))
        if unit.ssm and (call := self.trace.first(unit.ssm)) and call.end > 0:
            found.append(_Sublayer("ssm", call.start, next(iter(call.inputs), None), call))
        root = None
        if unit.experts:
            root = unit.experts.rpartition(".")[0]
            begin = end = self.trace.first(root if root != unit.path else unit.experts)
        else:
            begins = [call for role in ("gate_up", "gate", "up") for name in unit.mlp.get(role, [])
                      if (call := self.trace.first(name))]  # fmt: skip
            begin = min(begins, key=lambda call: call.start, default=None)
            end = self.trace.first(next(iter(unit.mlp.get("down", [])), None))
        if begin and end and end.end > 0:
            found.append(_Sublayer("mlp", begin.start, next(iter(begin.inputs), None), end))
        return sorted(found, key=lambda sub: sub.begin)

    def _follow(self, unit: _Unit) -> bool:
        """Read norms, inputs and outputs of the sub-layers off the trace; False when it did not come that far."""
        subs = self._sublayers(unit)
        calls = self.trace.within(unit.path)
        norms = [call for call in calls if self._is_own_norm(unit, call.path) and call.end > 0]
        whole = self.trace.first(unit.path)
        if not subs or whole is None:
            return False
        for sub in subs:
            unit.out[sub.name] = self._added(sub.last, calls)
            since = max((other.last.end for other in subs if other.begin < sub.begin), default=0)
            near = [n for n in norms if since < n.start and n.end <= sub.begin]
            # Windows are cut out of a norm's output in Swin: then the norm is known by what it reads.
            exact = [n for n in norms if n.end <= sub.begin and n.outputs[:1] == (sub.reads,)]
            if exact or (near and (unit.pre or near[-1].inputs[:1] == whole.inputs[:1])):
                unit.pre[sub.name] = (exact or near)[-1].path
        chains = {sub.name: self._chain(sub.last, calls) for sub in subs}
        first = subs[0]
        unit.leading_norm = first.name in unit.pre
        for sub, following in zip(subs, [*subs[1:], None], strict=True):
            inside = [path for path in chains[sub.name] if self._is_own_norm(unit, path)]
            if inside:
                unit.post[sub.name] = inside[-1]
            elif not unit.leading_norm:
                until = following.begin if following else float("inf")
                after = [n.path for n in norms if n.start > sub.last.end and n.end <= until]
                if after:
                    unit.post[sub.name] = after[0]
        if not unit.leading_norm:
            # A norm after the residual of one sub-layer feeds the next, which does not make it that one's pre-norm.
            unit.pre = {}
        mlp = next((sub for sub in subs if sub.name == "mlp"), None)
        if mlp is not None:
            self._entrance(unit, mlp, calls)
            attention = next((sub for sub in subs if sub.name == "attention"), None)
            if attention is not None:
                unit.parallel = self._stream(unit, attention, norms) == self._stream(unit, mlp, norms)
        return True

    def _stream(self, unit: _Unit, sub: _Sublayer, norms: list[Call]) -> Key | None:
        """The residual stream as a sub-layer finds it: the input of its norm, or its own."""
        norm = next((call for call in norms if call.path == unit.pre.get(sub.name)), None)
        return norm.inputs[0] if norm is not None else sub.reads

    def _is_own_norm(self, unit: _Unit, path: str) -> bool:
        if path not in self.modules or not is_norm(self.modules[path]):
            return False
        if any(place and path.startswith(place + ".") for place in (unit.ssm, unit.experts)):
            return False
        core = next((core for core in unit.cores if core.path != unit.path and path.startswith(core.path + ".")), None)
        if core is None:
            return True
        # ALBERT's attention module holds the norm after its residual, others those of queries and keys.
        call, end = self.trace.first(path), self.trace.first(core.first("output"))
        return call is not None and end is not None and call.start > end.end > 0

    def _chain(self, call: Call, calls: list[Call]) -> list[str]:
        """The modules that a tensor passes on its way from `call` to the first operation that is no module's."""
        counts: dict[str, int] = {}
        for other in calls:
            counts[other.path] = counts.get(other.path, 0) + 1
        chain, now = [], call
        while now.outputs:
            for other in calls:
                module = self.modules.get(other.path)
                if other.start < now.end or module is None or other.inputs[:1] != now.outputs[:1]:
                    continue
                leaf = not any(True for _ in module.children()) and not is_linear(module) and not is_conv(module)
                if leaf and counts[other.path] == 1:
                    chain.append(other.path)
                    now = other
                    break
            else:
                break
        return chain

    def _added(self, call: Call, calls: list[Call]) -> str:
        return [call.path, *self._chain(call, calls)][-1]

    def _entrance(self, unit: _Unit, mlp: _Sublayer, calls: list[Call]) -> None:
        """`mlp_in`, the outermost module that is given the sub-layer's input, and whether it is the whole of it."""
        layers = [name for group in unit.mlp.values() for name in group] + [path for path in [unit.experts] if path]
        for call in sorted(calls, key=lambda call: call.start):
            if call.inputs[:1] != (mlp.reads,) or call.start > mlp.begin or call.end < 0:
                continue
            holds = [name for name in layers if name == call.path or name.startswith(call.path + ".")]
            normed = any(
                other.start > mlp.last.end and other.end < call.end and self._is_own_norm(unit, other.path)
                for other in calls
            )
            if not holds or normed:
                continue
            unit.mlp_in = call.path
            if set(holds) == set(layers) and call.path not in layers:
                unit.mlp_module = call.path
            return

    def _guess(self, unit: _Unit) -> None:
        """Without a trace: norms in their order of definition, sub-layers end with their last layer."""
        norms = [path for path, _ in self._below(unit.path) if self._is_own_norm(unit, path)]
        parts = ["cross_attention" if core.cross else "attention" for core in unit.cores]
        parts += ["ssm"] * (unit.ssm is not None) + ["mlp"] * bool(unit.mlp or unit.experts)
        if parts and len(norms) == 2 * len(parts):
            unit.pre = dict(zip(parts, norms[0::2], strict=True))
            unit.post = dict(zip(parts, norms[1::2], strict=True))
        else:
            unit.pre = dict(zip(parts, norms, strict=False))
        container = unit.path.rpartition(".")[0]
        around = [path for path, module in self.modules.items() if is_norm(module) and not path.startswith(container)]
        unit.leading_norm = bool(parts) and any(not re.search("emb", path, re.I) for path in around)
        for core in unit.cores:
            unit.out["cross_attention" if core.cross else "attention"] = core.first("output") or core.path
        down = unit.mlp.get("down")
        mixture = unit.experts and unit.experts.rpartition(".")[0]
        unit.out["mlp"] = (mixture if mixture != unit.path else unit.experts) if mixture else down[0] if down else None
        unit.out["ssm"] = unit.ssm
        begins = [name for role in ("gate_up", "gate", "up") for name in unit.mlp.get(role, [])]
        entrance = unit.experts or next(iter(begins), None)
        if entrance is None:
            return
        around = entrance.rpartition(".")[0]
        layers = {name for group in unit.mlp.values() for name in group} | ({unit.experts} if unit.experts else set())
        unit.mlp_in = around if around != unit.path else entrance
        if around != unit.path and all(_holds(around, name) for name in layers):
            unit.mlp_module = around

    # Writing it down.

    def _block(self, unit: _Unit, index: int, stack: str, units: list[_Unit]) -> Block:
        own_core, cross = unit.core(False), unit.core(True)
        heads, kv_heads, head_dim = self._heads(own_core) if own_core else (None, None, None)
        return Block(
            path=unit.path,
            index=index,
            stack=stack,
            attention=own_core.path if own_core else None,
            cross_attention=cross.path if cross else None,
            mlp=unit.mlp_module,
            attention_out=unit.out.get("attention"),
            cross_attention_out=unit.out.get("cross_attention"),
            mlp_out=unit.out.get("mlp"),
            mlp_in=unit.mlp_in,
            attention_norm=unit.pre.get("attention") or unit.pre.get("ssm"),
            cross_attention_norm=unit.pre.get("cross_attention"),
            mlp_norm=unit.pre.get("mlp"),
            attention_post_norm=unit.post.get("attention"),
            mlp_post_norm=unit.post.get("mlp"),
            pre_norm=unit.leading_norm,
            parallel=unit.parallel,
            hidden_size=unit.hidden,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            ssm=unit.ssm,
            experts=unit.experts,
            router=unit.router,
            supports_attention_interface=own_core is not None and _uses_registry(self._get(own_core.path)),
            causal=self._causal(unit),
        )

    def _causal(self, unit: _Unit) -> bool:
        core = unit.core(False)
        if core is None:
            return unit.ssm is not None
        told = getattr(self._get(core.path), "is_causal", None)
        question = (type(self._get(core.path)), unit.path.rpartition(".")[0], told)
        if question not in self.asked:
            self.asked[question] = self._ask_causal(core, told)
        return self.asked[question]

    def _ask_causal(self, core: _Core, told: Any) -> bool:
        """Modules that say they are causal are believed; others may be given a causal mask from outside."""
        if told is True:
            return True
        values, output = core.first("value", "qkv"), core.first("output")
        sees_tokens = getattr(self.model, "main_input_name", "") != "pixel_values"
        if values and output and sees_tokens and not re.search(r"vision|visual", core.path, re.I):
            answer = ask_causal(self.model, values, output)
            if answer is not None:
                return answer
        return told if isinstance(told, bool) else bool(getattr(self.config, "is_decoder", "decoder" in core.path))

    def _stack_name(self, container: str, units: list[_Unit]) -> str:
        parts = container.lower()
        both = getattr(self.config, "is_encoder_decoder", False)
        if re.search(r"vision|visual|image", parts):
            return "vision"
        if re.search(r"text|language", parts):
            return "text"
        if getattr(self.model, "main_input_name", "") == "pixel_values" and not both:
            return "vision"
        causal = any(self._causal(unit) for unit in units)
        if any(unit.cores or unit.ssm for unit in units):
            if "decoder" in parts or "encoder" in parts:
                return "decoder" if "decoder" in parts else "encoder"
            return "decoder" if causal else "encoder"
        return "body"

    def _stack(self, container: str, name: str, blocks: list[Block]) -> Stack:
        norm = self._final_norm(container, blocks)
        if norm:
            self.norm_role[norm] = "norm.final"
        embedding = self._input_embedding(container)
        return Stack(
            name=name,
            path=container,
            blocks=tuple(block.index for block in blocks),
            embedding=embedding,
            position=self._position(container),
            final_norm=norm,
            causal=any(block.causal for block in blocks),
        )

    def _outside_norms(self) -> list[str]:
        return [path for path, module in self.modules.items() if is_norm(module) and not self._in_block(path)]

    def _final_norm(self, container: str, blocks: list[Block]) -> str | None:
        last = self.trace.first(blocks[-1].path)
        norms = self._outside_norms()
        if last is not None and last.end > 0:
            for call in self.trace.calls:
                if call.path in norms and call.start > last.end and call.inputs[:1] == last.outputs[:1]:
                    return call.path
            if self.trace.error is None:
                return None
        owner = container.rpartition(".")[0]
        near = [path for path in norms if path.rpartition(".")[0] == owner and not re.search("emb", path, re.I)]
        return near[-1] if near and blocks[-1].pre_norm else None

    def _input_embedding(self, container: str) -> str | None:
        around = container
        while True:
            getter = getattr(self.modules.get(around), "get_input_embeddings", None)
            if callable(getter):
                try:
                    found = self.path_of.get(id(getter()))
                except (NotImplementedError, AttributeError):
                    found = None
                if found is not None:
                    return found
            if not around:
                break
            around = around.rpartition(".")[0]
        outside = [path for path, module in self.modules.items() if is_embedding(module) and not self._in_block(path)]
        return next((path for path in outside if not names.POSITION.search(path.rpartition(".")[2])), None)

    def _position(self, container: str) -> str | None:
        """The learned positions nearest to a stack: an embedding, or the module that holds them as a parameter."""
        found: list[str] = []
        for path, module in self.modules.items():
            if self._in_block(path):
                continue
            hints = [path.rpartition(".")[2]] if is_embedding(module) else list(own(module))
            if any(names.POSITION.search(hint) for hint in hints):
                found.append(path)
        found = [path for path in found if not names.RELATIVE.search(path.rpartition(".")[2])] or found

        def nearness(path: str) -> int:
            ours, theirs = container.split("."), path.split(".")
            return next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), len(ours))

        return max(found, key=nearness, default=None)

    def _in_block(self, path: str) -> bool:
        return self._block_of(path) is not None

    def _block_of(self, path: str) -> str | None:
        if not hasattr(self, "_places"):
            self._places = {child for container in self._stacks() for child in self._children(container)}
        while path:
            if path in self._places:
                return path
            path = path.rpartition(".")[0]
        return None

    def _outside(self, found: Anatomy, containers: list[str]) -> None:
        """Everything outside the blocks: embeddings, positions, heads, poolers and norms."""
        stacks = found.stacks
        found.is_encoder_decoder = bool(getattr(self.config, "is_encoder_decoder", False))
        found.causal = bool(stacks) and stacks[-1].causal
        found.hidden_size = found.blocks[0].hidden_size if found.blocks else _integer([self.config], ("hidden_size",))
        found.final_norms = [stack.final_norm for stack in stacks if stack.final_norm]
        outside = {path: module for path, module in self.modules.items() if not self._in_block(path)}
        tokens = {stack.embedding for stack in stacks} | {self._input_embedding("")}
        for path, module in outside.items():
            last = path.rpartition(".")[2]
            if is_embedding(module):
                self.role[path] = (
                    "token_type" if names.TOKEN_TYPE.search(last)
                    else "position" if names.POSITION.search(last) and path not in tokens
                    else "embedding"
                )  # fmt: skip
            elif is_conv(module):
                self.role[path] = (
                    "patch" if re.search("patch|embed", path, re.I) else "stem" if found.blocks else "conv"
                )
        embeddings = [path for path, role in self.role.items() if role == "embedding"]
        if self.trace.error is None:
            # T5 and BART keep a copy of the shared table that nobody calls.
            for path in [path for path in embeddings if self.trace.first(path) is None]:
                del self.role[path]
                embeddings.remove(path)
        found.embedding = next((path for path in embeddings if path in tokens), embeddings[0] if embeddings else None)
        found.position = next((stack.position for stack in stacks if stack.position), self._position(""))
        self._head(found, outside)
        if found.embedding and found.head:
            ends = [own(self.modules[path]).get("weight") for path in (found.embedding, found.head)]
            found.tied = ends[0] is not None and ends[0] is ends[1]
        first = self.trace.first(found.blocks[0].path) if found.blocks else None
        for path in self._outside_norms():
            if path in self.norm_role:
                continue
            call = self.trace.first(path)
            ends = [c.end for block in found.blocks[-1:] if (c := self.trace.first(block.path))]
            after = bool(call and ends and ends[0] > 0 and call.start > ends[0])
            headed = self.role.get(path.rpartition(".")[0] + ".dense", "").startswith("head") or (
                found.head is not None and path.partition(".")[0] == found.head.partition(".")[0] != ""
                and "." in found.head
            )  # fmt: skip
            self.norm_role[path] = "norm.head" if after or headed else "norm.embedding" if first else "norm.other"

    def _head(self, found: Anatomy, outside: dict[str, nn.Module]) -> None:
        model = self.model
        linear = [path for path, module in outside.items() if is_linear(module)]
        getter = getattr(model, "get_output_embeddings", None)
        output = None
        if callable(getter):
            try:
                output = self.path_of.get(id(getter()))
            except (NotImplementedError, AttributeError):
                output = None
        base = getattr(model, "base_model_prefix", "")
        has_base = bool(base) and base in dict(model.named_children())
        if has_base:
            ours = [path for path in linear if path.split(".")[0] != base]
        else:
            ours = [
                path for path in linear
                if names.HEAD.fullmatch(path.split(".")[0]) or names.HEAD.fullmatch(path.rpartition(".")[2])
            ]  # fmt: skip
        if output is not None:
            found.head = output
        elif ours:
            calls = {path: call.start for path in ours if (call := self.trace.first(path))}
            found.head = max(calls, key=lambda path: calls[path]) if calls else ours[-1]
            tops = [path.split(".")[0] for path in ours]
            if has_base:
                found.head_new = list(dict.fromkeys(tops))
            elif self.config is None:
                found.head_new = [found.head]
        fresh = [path for path in getattr(model, FRESH, []) if path in self.modules]
        found.head_new += [path for path in fresh if not any(_holds(known, path) for known in found.head_new)]
        for path in linear:
            if path == found.head:
                self.role[path] = "head"
            elif re.search("pooler", path, re.I):
                self.role[path] = "pooler"
            elif path in ours:
                self.role[path] = "head.transform"
            elif found.blocks:
                self.role[path] = "projection"

    def _sites(self, blocks: list[Block]) -> Iterator[Site]:
        index = {block.path: block.index for block in blocks}
        for path, module in self.modules.items():
            place = self._block_of(path)
            block = index.get(place) if place else None
            role, called = self.role.get(path), path not in self.uncalled
            shared: dict[str, Any] = {"block": block, "called": called}
            if is_norm(module):
                held = own(module)
                parameter = "weight" if "weight" in held else next(iter(held), None)
                yield Site(path, self.norm_role.get(path, "norm.other"), "norm", parameter, **shared)
                continue
            kind = (
                "linear" if is_linear(module) else "conv" if is_conv(module)
                else "embedding" if is_embedding(module) else "other"
            )  # fmt: skip
            if kind == "embedding" and role is None and names.POSITION.search(path.rpartition(".")[2]):
                role = "position"
            for parameter, value in own(module).items():
                if parameter == "bias" or (kind != "other" and parameter != "weight"):
                    continue
                key, here, sort = f"{path}:{parameter}", role, kind
                if parameter == "in_proj_weight" and path in self.rows:
                    here, sort, key = "attention.qkv", "linear", path
                elif key in self.role:
                    here, sort = self.role[key], "experts"
                elif kind == "other" and role != "router":
                    here = self._parameter_role(path, parameter, value.ndim)
                yield Site(path, here, sort, parameter, **shared)
                rows_at = self.rows.get(key if sort == "experts" or parameter != "weight" else path, {})
                family = (here or "").partition(".")[0]
                for part, rows in rows_at.items():
                    yield Site(path, f"{family}.{part}", sort, parameter, part, rows, **shared)
        yield from self._module_sites(blocks)

    def _parameter_role(self, path: str, parameter: str, ndim: int) -> str | None:
        if names.POSITION.search(parameter):
            return "position"
        if re.search(r"(cls|class|mask|dist\w*)_(token|embedding)", parameter, re.I):
            return "class_token"
        if any(role.startswith("ssm.") and name.rpartition(".")[0] == path for name, role in self.role.items()):
            return f"ssm.{parameter.lower()}"
        return None

    def _module_sites(self, blocks: list[Block]) -> Iterator[Site]:
        for block in blocks:
            for role, kind, path in (
                ("block", "block", block.path), ("attention", "attention", block.attention),
                ("cross_attention", "attention", block.cross_attention), ("mlp", "mlp", block.mlp),
                ("ssm", "other", block.ssm), ("experts", "other", block.experts),
            ):  # fmt: skip
                if path is not None:
                    yield Site(path, role, kind, None, block=block.index)


def _holds(outer: str, path: str) -> bool:
    return path == outer or path.startswith(outer + ".")


def _integer(sources: Iterable[Any], attributes: Iterable[str]) -> int | None:
    for source in sources:
        for attribute in attributes:
            value = getattr(source, attribute, None)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
    return None


def _uses_registry(module: nn.Module) -> bool:
    """Whether the forward of an attention module looks its attention function up in transformers' registry."""
    forward = inspect.unwrap(type(module).forward)
    code = getattr(forward, "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names
