"""The blocks of a model by repetition, and the roles of their layers by shape and name hints."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn

from . import names
from .evidence import Attention, Evidence, Unit, integer
from .fused import experts_parts, gate_up_rows, qkv_rows
from .kinds import ATTENTION, experts_shapes, is_conv, is_depthwise, is_embedding, is_linear, is_norm, linear_shape, own
from .names import means

Shapes = dict[str, tuple[int, int]]
"""`(fan_out, fan_in)` of linear layers by path."""

Inside = list[tuple[str, nn.Module]]
"""The modules of a block with their paths."""


def find_stacks(seen: Evidence) -> list[str]:
    """The containers of blocks. A model whose blocks have norms has no other blocks than those."""
    found = list(stacks_in(seen, "", same_class=False))
    normed = [path for path in found if all(seen.has_norm(child) for child in seen.children(path))]
    return normed or found


def stacks_in(seen: Evidence, path: str, *, same_class: bool) -> Iterator[str]:
    """The outermost repetitions at and below `path`, or the equal blocks with norms inside them (Swin's stages)."""
    module = seen.modules[path]
    if is_stack(seen, path, same_class):
        inner = [deep for child in seen.children(path) for deep in stacks_in(seen, child, same_class=True)]
        inner = [deep for deep in inner if all(seen.has_norm(child) for child in seen.children(deep))]
        yield from inner or [path]
        return
    for name, _ in module.named_children():
        child = f"{path}.{name}" if path else name
        if child in seen.modules:
            yield from stacks_in(seen, child, same_class=same_class)


def is_stack(seen: Evidence, path: str, same_class: bool) -> bool:
    """Whether the children of a container are blocks: alike, or all with a norm, and with two weights at least."""
    module = seen.modules[path]
    if not isinstance(module, nn.ModuleList | nn.Sequential) or not len(module):
        return False
    children = seen.children(path)
    if any(child not in seen.modules or seen.weights_in(child) < 2 for child in children):
        return False
    if not any(True for _ in seen.modules[children[0]].children()):
        return False
    classes = {type(seen.modules[child]) for child in children}
    return len(classes) == 1 or (not same_class and all(seen.has_norm(child) for child in children))


def look_at(seen: Evidence, path: str) -> Unit:
    """Give every layer of the block at `path` its role."""
    unit = Unit(path)
    inside = list(seen.below(path))
    linear = {name: linear_shape(module) for name, module in inside if is_linear(module)}
    unit.cores = find_attentions(seen, unit, linear)
    taken = {name for core in unit.cores for names_ in core.layers.values() for name in names_}
    unit.hidden = stream_width(seen, unit, inside, linear)
    taken |= find_outputs(seen, unit, linear, taken)
    for core in unit.cores:
        split_qkv(seen, core)
    taken |= find_mixer(seen, unit, inside, linear, taken)
    taken |= find_experts(seen, unit, inside, linear, taken)
    rest = {name: shape for name, shape in linear.items() if name not in taken}
    for group in mlp_groups(seen, unit, rest):
        roles = mlp_roles(seen, group, rest, unit.hidden)
        for role, layer in roles.items():
            seen.role[layer] = f"mlp.{role}"
            unit.mlp.setdefault(role, []).append(layer)
        if (fused := roles.get("gate_up")) is not None:
            around = seen.get(fused.rpartition(".")[0])
            question = (type(around), linear[fused])
            if question not in seen.asked:
                seen.asked[question] = gate_up_rows(around, seen.get(fused), seen.get(roles["down"]))
            seen.rows[fused] = seen.asked[question]
    for name, module in inside:
        if is_conv(module) and name not in seen.role:
            seen.role[name] = "conv"
    return unit


def find_attentions(seen: Evidence, unit: Unit, linear: Shapes) -> list[Attention]:
    """The modules that hold layers for queries, keys and values, each of its own or fused."""
    cores = []
    for path, module in seen.below(unit.path):
        if isinstance(module, nn.MultiheadAttention):
            seen.uncalled |= {path, f"{path}.out_proj"}
            cores.append(Attention(path))
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
            fused = unnamed_qkv(seen, path, held, linear)
            if fused is None:
                continue
            layers = {"qkv": [fused]}
        cores.append(Attention(path, layers))
    for core in cores:
        core.cross = crosses(seen, core, unit)
        for role, layers_ in core.layers.items():
            give_role(seen, core, role, layers_)
    return cores


def give_role(seen: Evidence, core: Attention, role: str, layers: Iterable[str]) -> None:
    for layer in layers:
        seen.role[layer] = f"{'cross_attention' if core.cross else 'attention'}.{role}"


def unnamed_qkv(seen: Evidence, path: str, held: list[str], linear: Shapes) -> str | None:
    """In something like an attention, a first layer three times as wide as what a second layer reads."""
    like = ATTENTION.search(type(seen.modules[path]).__name__) or integer([seen.modules[path]], names.HEADS)
    if not like or len(held) != 2:
        return None
    first, second = held
    return first if linear[first][0] == 3 * linear[second][1] else None


def crosses(seen: Evidence, core: Attention, unit: Unit) -> bool:
    """An attention is a cross-attention when its keys are made from another tensor than its queries."""
    query, key = seen.trace.first(core.first("query")), seen.trace.first(core.first("key", "kv"))
    in_steps = any(len(core.layers.get(role, [])) > 1 for role in ("query", "kv"))  # low-rank projections
    if query and key and query.inputs and key.inputs and not in_steps:
        return query.inputs[0] != key.inputs[0]
    return names.CROSS.search(core.path.removeprefix(unit.path)) is not None


def stream_width(seen: Evidence, unit: Unit, inside: Inside, linear: Shapes) -> int | None:
    """Width of the residual stream: what the self-attention reads, else the block's own norm."""
    for core in unit.cores:
        if not core.cross and (layer := core.first("query", "qkv")) is not None:
            return linear[layer][1]
        if isinstance(module := seen.get(core.path), nn.MultiheadAttention):
            return module.embed_dim
    for name, module in inside:
        direct = name.rpartition(".")[0] == unit.path
        if direct and is_norm(module) and (weight := own(module).get("weight")) is not None:
            return weight.numel()
    return next((fan_in for _, fan_in in linear.values()), None)


def find_outputs(seen: Evidence, unit: Unit, linear: Shapes, taken: set[str]) -> set[str]:
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
            give_role(seen, core, "output", [name])
            found.add(name)
        for name in linear:
            if name.startswith(core.path + ".") and name not in taken | found:
                give_role(seen, core, "other", [name])
                found.add(name)
    return found


def split_qkv(seen: Evidence, core: Attention) -> None:
    """Find the rows of query, key and value in a fused projection."""
    layer = core.first("qkv")
    module = seen.get(core.path)
    if isinstance(module, nn.MultiheadAttention):
        width = module.embed_dim
        thirds = {part: tuple(range(i * width, (i + 1) * width)) for i, part in enumerate(("query", "key", "value"))}
        seen.rows[core.path] = thirds
    if layer is None:
        return
    heads, kv_heads, head_dim = head_counts(seen, core)
    if heads and kv_heads and head_dim:
        sizes = {
            "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim,
            "fan_out": linear_shape(seen.get(layer))[0],
        }  # fmt: skip
        question = (type(module), *sizes.values())
        if question not in seen.asked:
            seen.asked[question] = qkv_rows(seen.model, layer, core.first("output"), **sizes)
        seen.rows[layer] = seen.asked[question]


def head_counts(seen: Evidence, core: Attention) -> tuple[int | None, int | None, int | None]:
    """`(heads, key-value heads, head width)`: widths of layers where they tell, attributes where they must."""
    module = seen.get(core.path)
    if isinstance(module, nn.MultiheadAttention):
        return module.num_heads, module.num_heads, module.head_dim
    sources = [module, getattr(module, "config", None), seen.config]
    heads, width = integer(sources, names.HEADS), integer(sources, names.HEAD_DIM)
    query, key, fused = core.first("query"), core.first("key"), core.first("qkv")
    output = core.first("output")
    if query is not None and len(core.layers["query"]) == 1:
        total = linear_shape(seen.get(query))[0]
    elif output is not None:
        total = linear_shape(seen.get(output))[1]
    else:
        return heads, integer(sources, names.KV_HEADS) or heads, width
    if width is None or total % width or "kv" in core.layers:
        width = total // heads if heads and total % heads == 0 else None
    if width is None:
        return heads, integer(sources, names.KV_HEADS) or heads, None
    heads = total // width
    if "kv" in core.layers:
        return heads, heads, width
    if key is not None:
        return heads, linear_shape(seen.get(key))[0] // width, width
    if fused is not None and query is None:
        return heads, (linear_shape(seen.get(fused))[0] // width - heads) // 2, width
    return heads, integer(sources, names.KV_HEADS) or heads, width


def find_mixer(seen: Evidence, unit: Unit, inside: Inside, linear: Shapes, taken: set[str]) -> set[str]:
    """A mixer that holds a depthwise convolution, linear layers, and parameters of its own (the state's)."""
    found: set[str] = set()
    for path, module in inside:
        convs = [
            name for name, child in inside
            if name.rpartition(".")[0] == path and is_depthwise(child)
        ]  # fmt: skip
        held = [name for name in linear if name.rpartition(".")[0] == path and name not in taken]
        if not convs or not held or not own(module):
            continue
        unit.ssm = path
        for name in convs:
            seen.role[name] = "ssm.conv"
            seen.uncalled.add(name)
        for index, name in enumerate(held):
            fan_out, fan_in = linear[name]
            if fan_in == unit.hidden and fan_out > fan_in and index == 0:
                role = "in"
            elif fan_out == unit.hidden and index == len(held) - 1:
                role = "out"
            else:
                role = "x" if fan_in > fan_out else "dt"
            seen.role[name] = f"ssm.{role}"
            calls = seen.trace.first(path)
            if role == "dt" or (calls and calls.end > 0 and seen.trace.first(name) is None):
                seen.uncalled.add(name)
        found |= set(held)
    return found


def find_experts(seen: Evidence, unit: Unit, inside: Inside, linear: Shapes, taken: set[str]) -> set[str]:
    """Experts, fused in 3-D parameters or as a list of equal modules, and the router: as many outputs as experts."""
    found: set[str] = set()
    count = None
    for path, module in inside:
        if any(path.startswith(core.path + ".") for core in unit.cores):
            continue
        if shapes := experts_shapes(module):
            count = next(iter(shapes.values()))[0]
            unit.experts = unit.experts or path
            for parameter, (role, parts) in experts_parts(module, unit.hidden).items():
                seen.role[f"{path}:{parameter}"] = f"expert.{role}"
                seen.rows[f"{path}:{parameter}"] = parts
        elif isinstance(module, nn.ModuleList) and len(module) > 1:
            children = seen.children(path)
            groups = [[name for name in linear if name.startswith(child + ".")] for child in children]
            if len({type(child) for child in module}) > 1 or any(len(group) < 2 for group in groups):
                continue
            if any(seen.has_norm(child) for child in children) or taken & {name for g in groups for name in g}:
                continue
            count, unit.experts = len(module), unit.experts or path
            for group in groups:
                for role, name in mlp_roles(seen, group, linear, unit.hidden).items():
                    seen.role[name] = f"expert.{role}"
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
            seen.role[path] = "router"
            found.add(path)
            if fan_out == count:
                unit.router = path
            if path not in linear:
                seen.uncalled.add(path)
    return found


def mlp_groups(seen: Evidence, unit: Unit, rest: Shapes) -> list[list[str]]:
    """Layers that stand together, and as one more group those that stand alone (as BERT's two do)."""
    groups: dict[str, list[str]] = {}
    for name in rest:
        groups.setdefault(name.rpartition(".")[0], []).append(name)
    alone = [name for group in groups.values() if len(group) == 1 for name in group]
    return [group for group in [*groups.values(), alone] if len(group) > 1 or (group is alone and len(alone) > 1)]


def mlp_roles(seen: Evidence, group: list[str], shapes: Shapes, hidden: int | None) -> dict[str, str]:
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
    gate = activated(seen, begins) or next((name for name in begins if means(names.GATE, name)), begins[0])
    up = next(name for name in begins if name != gate)
    return {"gate": gate, "up": up, "down": down}


def activated(seen: Evidence, layers: list[str]) -> str | None:
    """Which of the layers is the one whose output goes through the activation, if the activation is a module."""
    for name in layers:
        call = seen.trace.first(name)
        if call is None or call.end < 0:
            continue
        around = seen.trace.within(name.rpartition(".")[0])
        for other in around:
            module = seen.modules.get(other.path)
            if other.start < call.end or module is None or other.inputs[:1] != call.outputs[:1]:
                continue
            if not own(module) and not isinstance(module, nn.Identity | nn.Dropout):
                return name
    return None
