"""Which rows of a fused projection are the query's, the key's, the value's; the gate's and the up-projection's.

Shapes cannot tell (GPT-2 stacks `q | k | v`, GPT-NeoX interleaves them head by head, Falcon group by group), and names
tell only if one knows the model. So the model is asked. Its own attention runs, without weights, on a chosen output of
the fused layer `z`, and the gradient of the last position's result with respect to the first position's `z` says what
each row does: a query acts on its own position only (no gradient), a key only where values differ from position to
position, a value always. A gate is the half of a feed-forward layer in which the result is not odd.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from .kinds import experts_shapes, linear_shape
from .names import DOWN, GATE, MEGATRON, means
from .trace import dummy_inputs, ghost, on, stub

Rows = dict[str, tuple[int, ...]]


def qkv_rows(
    model: nn.Module, layer: str, output: str | None, *, heads: int, kv_heads: int, head_dim: int, fan_out: int
) -> Rows:
    """Rows of `query`, `key` and `value` in the fused layer called `layer`, whose attention ends in `output`.

    Empty when the widths do not add up to three projections.
    """
    if (heads + 2 * kv_heads) * head_dim != fan_out or kv_heads < 1:
        return {}
    found = ask_attention(model, layer, output) if output is not None else {}
    wanted = {"query": heads * head_dim, "key": kv_heads * head_dim, "value": kv_heads * head_dim}
    if {part: len(rows) for part, rows in found.items()} == wanted:
        return found
    # It could not be run: the layout of Megatron's descendants goes with the name they gave it.
    groups = kv_heads if MEGATRON.search(layer) else 1
    return _grouped(groups, heads // groups * head_dim, kv_heads // groups * head_dim)


def _grouped(groups: int, query: int, key: int) -> Rows:
    rows: dict[str, list[int]] = {"query": [], "key": [], "value": []}
    start = 0
    for _ in range(groups):
        for part, width in (("query", query), ("key", key), ("value", key)):
            rows[part] += range(start, start + width)
            start += width
    return {part: tuple(indices) for part, indices in rows.items()}


class _Reached(Exception):
    """The attention's result has arrived at its output projection."""


def ask_attention(model: nn.Module, layer: str, output: str) -> Rows:
    """The rows of `layer` by what they do to the input of `output`; empty when the model cannot be run."""
    try:
        shell = ghost(model, "cpu")
        alike = _sensitivity(shell, layer, output, alike=True)
        varied = _sensitivity(shell, layer, output)
    except Exception:  # any model may refuse to run on dummy inputs
        return {}
    value = alike > 1e-4 * alike.max()
    key = (varied > 0) & ~value
    parts = {"query": ~(value | key), "key": key, "value": value}
    return {part: tuple(mask.nonzero().flatten().tolist()) for part, mask in parts.items()}


def ask_causal(model: nn.Module, layer: str, output: str) -> bool | None:
    """Whether the first position's attention is blind to the last one's value; None when the model cannot be run.

    `layer` makes the values (or all of queries, keys and values), `output` is the attention's output projection.
    """
    try:
        return not bool(_sensitivity(ghost(model, "cpu"), layer, output, of=0, to=-1).any())
    except Exception:  # as above
        return None


def _sensitivity(
    shell: nn.Module, layer: str, output: str, *, of: int = -1, to: int = 0, alike: bool = False
) -> Tensor:
    """|d result(position `of`) / d z(position `to`)| per row of z; z is the same at all positions when `alike`."""
    module = shell.get_submodule(layer)
    fan_out = linear_shape(module)[0]
    generator = torch.Generator().manual_seed(0)
    seen: dict[str, Tensor] = {}

    def chosen(x: Tensor, *_: Any, **__: Any) -> Tensor:
        shape = (1,) * (x.ndim - 2) + (1 if alike else x.shape[-2], fan_out)
        seen["z"] = torch.randn(shape, generator=generator).expand(*x.shape[:-1], fan_out).clone().requires_grad_()
        return seen["z"]

    def reached(x: Tensor, *_: Any, **__: Any) -> Tensor:
        seen["result"] = x
        raise _Reached

    module.forward = chosen
    shell.get_submodule(output).forward = reached
    failure: Exception | None = None
    for args, kwargs in dummy_inputs(shell):
        args = tuple(on("cpu", value) for value in args)
        kwargs = {name: on("cpu", value) for name, value in kwargs.items()}
        with torch.enable_grad(), torch.random.fork_rng(devices=[]):
            try:
                shell(*args, **kwargs)
            except _Reached:
                (gradient,) = torch.autograd.grad(seen["result"][..., of, :].sum(), seen["z"])
                return gradient[..., to, :].abs().reshape(-1, fan_out).sum(0)
            except Exception as error:
                failure = error
    raise failure or RuntimeError(f"{output} is never called")


def gate_up_rows(mlp: nn.Module, layer: nn.Module, down: nn.Module) -> Rows:
    """Rows of `gate` (the half that is activated) and `up` in the fused first layer of a gated feed-forward module."""
    fan_out, fan_in = linear_shape(layer)
    first, second = tuple(range(fan_out // 2)), tuple(range(fan_out // 2, fan_out))
    gate_first = _gate_first(mlp, layer, down, fan_in, fan_out)
    return {"gate": first, "up": second} if gate_first else {"gate": second, "up": first}


def _gate_first(mlp: nn.Module, layer: nn.Module, down: nn.Module, fan_in: int, fan_out: int) -> bool:
    paths = {id(module): path for path, module in mlp.named_modules()}
    if id(layer) not in paths or id(down) not in paths:
        return True
    z = torch.randn(1, 2, fan_out, generator=torch.Generator().manual_seed(0))
    results: list[Tensor] = []
    try:
        shell = ghost(copy.copy(mlp), "cpu")
        sign = torch.ones(fan_out)
        shell.get_submodule(paths[id(layer)]).forward = lambda *_: z * sign
        end = shell.get_submodule(paths[id(down)])
        stub(end, linear_shape(down)[0])
        end.register_forward_pre_hook(lambda _, args: results.append(args[0]))
        for flipped in (slice(0, 0), slice(fan_out // 2, fan_out)):
            sign = torch.ones(fan_out)
            sign[flipped] = -1
            with torch.no_grad():
                shell(torch.zeros(1, 2, fan_in))
    except Exception:  # it takes more than its input, or there is no module that is the feed-forward part alone
        return True
    return torch.allclose(results[1], -results[0])


def experts_parts(module: nn.Module, hidden: int | None) -> dict[str, tuple[str, Rows]]:
    """Role (`gate_up`, `up`, `down`) and parts of each fused 3-D parameter of an experts module.

    transformers' expert modules say of themselves whether they store `in x out` and whether gate and up alternate.
    """
    transposed = bool(getattr(module, "is_transposed", False))
    shapes = {
        name: (columns, rows) if transposed else (rows, columns)
        for name, (_, rows, columns) in experts_shapes(module).items()
    }
    down = [name for name in shapes if means(DOWN, name)]
    down = down or [name for name, (fan_out, fan_in) in shapes.items() if fan_out == hidden != fan_in]
    inner = shapes[down[0]][1] if down else None
    found: dict[str, tuple[str, Rows]] = {name: ("down", {}) for name in down[:1]}
    for name, (fan_out, _) in shapes.items():
        if name in found:
            continue
        if inner is not None and fan_out == 2 * inner:
            halves = (slice(None, inner), slice(inner, None))
            if not getattr(module, "is_concatenated", True):
                halves = (slice(None, None, 2), slice(1, None, 2))
            every = tuple(range(fan_out))
            found[name] = ("gate_up", {"gate": every[halves[0]], "up": every[halves[1]]})
        else:
            found[name] = ("gate" if means(GATE, name) else "up", {})
    return found
