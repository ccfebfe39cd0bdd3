"""Norms, inputs and outputs of a block's sub-layers, read off the trace; guessed where there is none."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .evidence import Evidence, Unit, holds
from .kinds import is_conv, is_linear, is_norm
from .trace import Call, Key


@dataclass
class Sublayer:
    """A sub-layer's life in the trace: when it began, on which tensor, and the module that ends it."""

    name: str
    begin: int
    reads: Key | None
    last: Call


def settle_norms(seen: Evidence, units: list[Unit]) -> None:
    """Find the norms, inputs and outputs of the sub-layers of a stack's blocks, and give the norms their roles.

    Whether a stack is pre-norm is decided for all its blocks together: ModernBERT's first block has no norm before its
    attention, since the embedding's norm stands there.
    """
    for unit in units:
        if seen.trace.first(unit.path) is None or not follow(seen, unit):
            guess(seen, unit)
    pre_norm = any(unit.leading_norm for unit in units)
    for unit in units:
        if not pre_norm:
            for name, path in unit.post.items():
                unit.pre.setdefault(name, path)
            unit.post = {name: path for name, path in unit.post.items() if unit.pre.get(name) != path}
        unit.leading_norm = pre_norm
        if unit.ssm:
            seen.norm_role |= {path: "ssm.inner_norm" for path, m in seen.below(unit.ssm) if is_norm(m)}
        for name, path in unit.post.items():
            seen.norm_role[path] = f"{name}.post_norm"
        for name, path in reversed(list(unit.pre.items())):
            seen.norm_role[path] = f"{name}.norm"
        for core in unit.cores:
            for path, module in seen.below(core.path):
                if is_norm(module) and path not in seen.norm_role:
                    which = "query" if re.search(r"(^|_)q", path.rpartition(".")[2]) else "key"
                    seen.norm_role[path] = f"{'cross_attention' if core.cross else 'attention'}.{which}_norm"


def mixture_of(unit: Unit) -> str | None:
    """The module that holds router and experts, the experts themselves where the block holds them directly."""
    around = (unit.experts or "").rpartition(".")[0]
    return around if around != unit.path else unit.experts


def sublayers(seen: Evidence, unit: Unit) -> list[Sublayer]:
    """The sub-layers that the trace saw end, in order of their beginning."""
    found = []
    for core in unit.cores:
        begin = seen.trace.first(core.first("query", "qkv") or core.path)
        end = seen.trace.first(core.first("output") or core.path) or seen.trace.first(core.path)
        if begin and end and end.end > 0:
            name = "cross_attention" if core.cross else "attention"
            found.append(Sublayer(name, begin.start, next(iter(begin.inputs), None), end))
    if unit.ssm and (call := seen.trace.first(unit.ssm)) and call.end > 0:
        found.append(Sublayer("ssm", call.start, next(iter(call.inputs), None), call))
    if unit.experts:
        begin = end = seen.trace.first(mixture_of(unit))
    else:
        firsts = [name for role in ("gate_up", "gate", "up") for name in unit.mlp.get(role, [])]
        begins = [call for name in firsts if (call := seen.trace.first(name))]
        begin = min(begins, key=lambda call: call.start, default=None)
        end = seen.trace.first(next(iter(unit.mlp.get("down", [])), None))
    if begin and end and end.end > 0:
        found.append(Sublayer("mlp", begin.start, next(iter(begin.inputs), None), end))
    return sorted(found, key=lambda sub: sub.begin)


def follow(seen: Evidence, unit: Unit) -> bool:
    """Read norms, inputs and outputs of the sub-layers off the trace; False when it did not come that far."""
    subs = sublayers(seen, unit)
    calls = seen.trace.within(unit.path)
    norms = [call for call in calls if is_own_norm(seen, unit, call.path) and call.end > 0]
    whole = seen.trace.first(unit.path)
    if not subs or whole is None:
        return False
    for sub in subs:
        unit.out[sub.name] = added_by(seen, sub.last, calls)
        since = max((other.last.end for other in subs if other.begin < sub.begin), default=0)
        near = [n for n in norms if since < n.start and n.end <= sub.begin]
        # Windows are cut out of a norm's output in Swin: then the norm is known by what it reads.
        exact = [n for n in norms if n.end <= sub.begin and n.outputs[:1] == (sub.reads,)]
        if exact or (near and (unit.pre or near[-1].inputs[:1] == whole.inputs[:1])):
            unit.pre[sub.name] = (exact or near)[-1].path
    chains = {sub.name: passed_on(seen, sub.last, calls) for sub in subs}
    first = subs[0]
    unit.leading_norm = first.name in unit.pre
    for sub, following in zip(subs, [*subs[1:], None], strict=True):
        inside = [path for path in chains[sub.name] if is_own_norm(seen, unit, path)]
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
        find_entrance(seen, unit, mlp, calls)
        attention = next((sub for sub in subs if sub.name == "attention"), None)
        if attention is not None:
            unit.parallel = stream_of(seen, unit, attention, norms) == stream_of(seen, unit, mlp, norms)
    return True


def stream_of(seen: Evidence, unit: Unit, sub: Sublayer, norms: list[Call]) -> Key | None:
    """The residual stream as a sub-layer finds it: the input of its norm, or its own."""
    norm = next((call for call in norms if call.path == unit.pre.get(sub.name)), None)
    return norm.inputs[0] if norm is not None else sub.reads


def is_own_norm(seen: Evidence, unit: Unit, path: str) -> bool:
    """Whether a module is a norm of the block's residual stream and not one of a sub-layer's inside."""
    if path not in seen.modules or not is_norm(seen.modules[path]):
        return False
    if any(place and path.startswith(place + ".") for place in (unit.ssm, unit.experts)):
        return False
    core = next((core for core in unit.cores if core.path != unit.path and path.startswith(core.path + ".")), None)
    if core is None:
        return True
    # ALBERT's attention module holds the norm after its residual, others those of queries and keys.
    call, end = seen.trace.first(path), seen.trace.first(core.first("output"))
    return call is not None and end is not None and call.start > end.end > 0


def passed_on(seen: Evidence, call: Call, calls: list[Call]) -> list[str]:
    """The modules that a tensor passes on its way from `call` to the first operation that is no module's."""
    counts: dict[str, int] = {}
    for other in calls:
        counts[other.path] = counts.get(other.path, 0) + 1
    chain, now = [], call
    while now.outputs:
        for other in calls:
            module = seen.modules.get(other.path)
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


def added_by(seen: Evidence, call: Call, calls: list[Call]) -> str:
    """The module whose output is added to the residual, when `call` is the sub-layer's last layer."""
    return [call.path, *passed_on(seen, call, calls)][-1]


def find_entrance(seen: Evidence, unit: Unit, mlp: Sublayer, calls: list[Call]) -> None:
    """`mlp_in`, the outermost module that is given the sub-layer's input, and whether it is the whole of it."""
    layers = [name for group in unit.mlp.values() for name in group] + [path for path in [unit.experts] if path]
    for call in sorted(calls, key=lambda call: call.start):
        if call.inputs[:1] != (mlp.reads,) or call.start > mlp.begin or call.end < 0:
            continue
        inside = [name for name in layers if holds(call.path, name)]
        normed = any(
            other.start > mlp.last.end and other.end < call.end and is_own_norm(seen, unit, other.path)
            for other in calls
        )
        if not inside or normed:
            continue
        unit.mlp_in = call.path
        if set(inside) == set(layers) and call.path not in layers:
            unit.mlp_module = call.path
        return


def guess(seen: Evidence, unit: Unit) -> None:
    """Without a trace: norms in their order of definition, sub-layers end with their last layer."""
    norms = [path for path, _ in seen.below(unit.path) if is_own_norm(seen, unit, path)]
    parts = ["cross_attention" if core.cross else "attention" for core in unit.cores]
    parts += ["ssm"] * (unit.ssm is not None) + ["mlp"] * bool(unit.mlp or unit.experts)
    if parts and len(norms) == 2 * len(parts):
        unit.pre = dict(zip(parts, norms[0::2], strict=True))
        unit.post = dict(zip(parts, norms[1::2], strict=True))
    else:
        unit.pre = dict(zip(parts, norms, strict=False))
    container = unit.path.rpartition(".")[0]
    around = [path for path, module in seen.modules.items() if is_norm(module) and not path.startswith(container)]
    unit.leading_norm = bool(parts) and any(not re.search("emb", path, re.I) for path in around)
    for core in unit.cores:
        unit.out["cross_attention" if core.cross else "attention"] = core.first("output") or core.path
    down = unit.mlp.get("down")
    unit.out["mlp"] = mixture_of(unit) if unit.experts else down[0] if down else None
    unit.out["ssm"] = unit.ssm
    begins = [name for role in ("gate_up", "gate", "up") for name in unit.mlp.get(role, [])]
    entrance = unit.experts or next(iter(begins), None)
    if entrance is None:
        return
    around = entrance.rpartition(".")[0]
    layers = {name for group in unit.mlp.values() for name in group} | ({unit.experts} if unit.experts else set())
    unit.mlp_in = around if around != unit.path else entrance
    if around != unit.path and all(holds(around, name) for name in layers):
        unit.mlp_module = around
