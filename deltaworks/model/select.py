"""From what a person writes (`on="attention"`) to sites.

`on` is one of, or a list of (their union, in model order):

- "all": the linear layers inside the blocks, experts' parameters among them; convolutions stand in where a block has no
  linear layer. Never embeddings, heads or routers. A model without blocks gives all its linear layers but the head.
- a role ("attention.query") or the first part of one ("attention": every linear layer of the self-attentions; "norm":
  every norm). A fused layer is given whole, unless a part of it is asked for. For whole modules ("module"): "block",
  "attention", "mlp", ... give the modules of that kind.
- a regular expression over dotted module names, matched to the name's end from any dot on: `q_proj`, `attn.q` (which
  is no match for `xattn.q`), `layers.[01].mlp.up_proj`. For weights a module that is no layer stands for the linear
  layers in it, and an expert parameter is named like a module (`experts.down_proj`).
- a module type, or the name of its class or of one it derives from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import regex
from torch import nn

from .anatomy import Anatomy, Site, What
from .kinds import base_modules
from .names import ends

MATRICES = ("linear", "experts")
MODULES = ("block", "attention", "cross_attention", "mlp", "ssm", "experts")


def select(anatomy: Anatomy, on: object, what: What = "weight", *, strict: bool = True) -> list[Site]:
    """The sites that `on` names, in model order and each once.

    Args:
        anatomy: of the model.
        on: see this module's docstring.
        what: "weight" for parameters, "module" for the modules whose calls can be changed.
        strict: whether every member of a list must match something, or only the list as a whole.

    Raises:
        ValueError: when nothing matches, or `on` is nothing that could; one line that lists what there is.
    """
    members = list(on) if isinstance(on, list | tuple | set | frozenset) else [on]
    if not members:
        raise ValueError(f"on={on!r} names nothing; {_there_is(anatomy)}")
    chosen: dict[Site, None] = {}
    for member in members:
        found = _one(anatomy, member, what)
        if not found and strict:
            raise ValueError(f"on={member!r} matches nothing in {type(anatomy.model).__name__}; {_there_is(anatomy)}")
        chosen |= dict.fromkeys(found)
    if not chosen:
        raise ValueError(f"on={on!r} matches nothing in {type(anatomy.model).__name__}; {_there_is(anatomy)}")
    whole = {(site.path, site.parameter) for site in chosen if site.part is None}
    kept = [site for site in chosen if site.part is None or (site.path, site.parameter) not in whole]
    place = {path: index for index, (path, _) in enumerate(base_modules(anatomy.model))}
    return sorted(kept, key=lambda site: place[site.path])


def _one(anatomy: Anatomy, member: object, what: What) -> list[Site]:
    if isinstance(member, type):
        return _modules(anatomy, lambda _, module: isinstance(module, member), what)
    if not isinstance(member, str):
        raise ValueError(
            f"on={member!r} is a {type(member).__name__}; give a role, 'all', a regular expression, a module type, "
            "or a list of these"
        )
    if member == "all":
        return _all(anatomy, what)
    return _by_role(anatomy, member, what) or _by_class(anatomy, member, what) or _by_name(anatomy, member, what)


def _all(anatomy: Anatomy, what: What) -> list[Site]:
    whole = [site for site in anatomy.sites if site.part is None and site.parameter is not None]
    inside = [site for site in whole if site.role != "router" and (site.block is not None or not anatomy.blocks)]
    with_linear = {site.block for site in inside if site.kind in MATRICES}
    chosen = [
        site for site in inside
        if site.kind in MATRICES or (site.kind == "conv" and site.block not in with_linear)
    ]  # fmt: skip
    if not anatomy.blocks:
        chosen = [site for site in chosen if not (site.role or "").startswith("head")]
    return chosen if what == "weight" else _owners(chosen)


def _by_role(anatomy: Anatomy, role: str, what: What) -> list[Site]:
    if what == "module" and role in MODULES:
        found = [site for site in anatomy.sites if site.parameter is None and site.role == role]
        if found:
            return found
    with_parameter = [site for site in anatomy.sites if site.parameter is not None]
    exact = [site for site in with_parameter if site.role == role]
    if not exact and role == "norm":
        exact = [site for site in with_parameter if site.kind == "norm"]
    if exact and role not in ("head",):
        return exact if what == "weight" else _owners(exact)
    below = [
        site for site in with_parameter
        if site.role is not None and (site.role == role or site.role.startswith(role + ".")) and site.part is None
        and site.kind in (*MATRICES, "conv")
    ]  # fmt: skip
    if any(site.kind in MATRICES for site in below):
        below = [site for site in below if site.kind in MATRICES]
    return below if what == "weight" else _owners(below)


def _owners(sites: Iterable[Site]) -> list[Site]:
    """Sites of parameters as places in the computation: experts' parameters have no call of their own."""
    return list(dict.fromkeys(sites))


def _by_class(anatomy: Anatomy, name: str, what: What) -> list[Site]:
    return _modules(anatomy, lambda _, module: name in {cls.__name__ for cls in type(module).__mro__[:-2]}, what)


def _by_name(anatomy: Anatomy, expression: str, what: What) -> list[Site]:
    try:
        regex.compile(expression)
    except regex.error as error:
        raise ValueError(f"on={expression!r} is no role and no regular expression: {error}") from None
    found = _modules(anatomy, lambda path, _: ends(expression, path), what)
    named = [
        site for site in anatomy.sites
        if site.part is None and site.parameter not in (None, "weight") and ends(expression, site.name)
    ]  # fmt: skip
    return found + named if what == "weight" else found


def _modules(anatomy: Anatomy, matches: Callable[[str, nn.Module], bool], what: What) -> list[Site]:
    """Sites at the modules that match; for weights, a module that is no layer stands for the linear layers in it."""
    paths = [path for path, module in base_modules(anatomy.model) if matches(path, module)]
    at: dict[str, list[Site]] = {}
    for site in anatomy.sites:
        if site.part is None:
            at.setdefault(site.path, []).append(site)
    found: list[Site] = []
    for path in paths:
        here = at.get(path, [])
        if what == "module":
            whole = [site for site in here if site.parameter is None]
            layers = [site for site in here if site.parameter == "weight" and site.kind != "other"]
            block = here[0].block if here else _block_of(anatomy, path)
            found.append((whole or layers or [Site(path, None, "other", None, block=block)])[0])
            continue
        weights = [site for site in here if site.parameter is not None]
        if not weights or all(site.kind == "other" for site in weights):
            prefix = f"{path}." if path else ""
            weights += [
                site for other, sites in at.items() if other.startswith(prefix) and other != path
                for site in sites if site.kind in MATRICES and site.parameter is not None
            ]  # fmt: skip
        found += weights
    return found


def _block_of(anatomy: Anatomy, path: str) -> int | None:
    return next((block.index for block in anatomy.blocks if path.startswith(block.path + ".")), None)


def _there_is(anatomy: Anatomy) -> str:
    roles = ", ".join(f"{role} ({count})" for role, count in anatomy.roles().items())
    layers = [site.path for site in anatomy.sites if site.kind in (*MATRICES, "conv") and site.part is None]
    short = list(dict.fromkeys(path.rpartition(".")[2] for path in layers))[:8]
    return f"roles: {roles or 'none'}; 'all'; layers such as {', '.join(short) or 'none'}; types such as Linear"
