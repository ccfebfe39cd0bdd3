"""Checkpoints: everything a run needs to go on as if it had not stopped, except the base.

A checkpoint is written beside its place and renamed into it, so that whatever moment a process dies at, a folder that
has a checkpoint's name is whole. It holds the adapter's tensors, the rules' state, optimizer, scheduler, random states
and the trainer's own state, with which the order of the data continues.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ..adapters.files import CONFIG, exchange
from ..adapters.native import tensor_name
from ..core.part import Trained
from ..core.tuned import Tuned

TENSORS, RULES, OPTIMIZER, SCHEDULER = "adapter.safetensors", "rules.pt", "optimizer.pt", "scheduler.pt"
_NAME = re.compile(r"checkpoint-(\d+)")


def step_of(folder: Path) -> int | None:
    """The step a folder's name says it is a checkpoint of, None for any other folder."""
    match = _NAME.fullmatch(folder.name)
    return int(match[1]) if match else None


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints in a folder, oldest first."""
    found = {path: step_of(path) for path in folder.glob("checkpoint-*") if path.is_dir()}
    return sorted((path for path, step in found.items() if step is not None), key=lambda path: found[path] or 0)


def latest(folder: Path) -> Path | None:
    """The checkpoint to resume from, None when there is none yet."""
    return next(reversed(checkpoints(folder)), None)


@contextlib.contextmanager
def replacing(final: Path, *, main: bool = True, wait: Callable[[], None] = lambda: None) -> Iterator[Path]:
    """Write a folder so that it appears whole or not at all.

    Args:
        final: where it shall be.
        main: whether this process makes and renames the folder; the others only write into it.
        wait: a barrier over all processes.

    Yields:
        A folder beside `final` to write into.
    """
    part, old = final.with_name(f".{final.name}.part"), final.with_name(f".{final.name}.old")
    if main:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    wait()
    yield part
    wait()
    if main:
        _flush(part)
        if not final.exists():
            part.rename(final)
        elif not exchange(part, final):
            shutil.rmtree(old, ignore_errors=True)
            final.rename(old)
            part.rename(final)
        _flush_entry(final.parent)
        shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(part, ignore_errors=True)
    wait()


def _flush(folder: Path) -> None:
    """Force a folder's content to the disk: a rename must not overtake what it names."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    _flush_entry(folder)


def _flush_entry(folder: Path) -> None:
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def rotate(folder: Path, keep: int | None, best: str | None = None) -> None:
    """Delete the oldest checkpoints beyond `keep`, never the best one; renamed first, so that none is ever half."""
    for ending in ("old", "part"):
        for leftover in folder.glob(f".checkpoint-*.{ending}"):
            shutil.rmtree(leftover, ignore_errors=True)
    if not keep or keep < 1:
        return
    for path in checkpoints(folder)[:-keep]:
        if best is None or path.resolve() != Path(best).resolve():
            gone = path.rename(path.with_name(f".{path.name}.old"))
            shutil.rmtree(gone, ignore_errors=True)


def write_adapter(tuned: Tuned, folder: Path, *, main: bool = True) -> None:
    """Write an adapter's tensors, gathered where they are sharded; every process must call it."""
    tensors = {name: whole(value.detach()).cpu().contiguous() for name, value in tuned.tensors().items()}
    if main:
        # Tensors of one storage (views, tied parts) are stored apart: safetensors refuses shared memory.
        save_file({name: value.clone() for name, value in tensors.items()}, folder / TENSORS)


def read_adapter(tuned: Tuned, folder: Path) -> None:
    """Put a checkpoint's tensors into the adapter, in place; sizes that a rule changed are changed again.

    Raises:
        ValueError: when the file's tensors are not this adapter's.
    """
    places = _places(tuned, exported=is_exported(folder))
    path = folder / TENSORS
    try:
        file = safe_open(path, framework="pt")
    except Exception as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    with file:
        found = set(file.keys())
        if found != set(places):
            odd = sorted(found ^ set(places))[:3]
            raise ValueError(f"{path} does not fit the adapter {tuned.name!r} ({tuned.method.slug}): {', '.join(odd)}")
        for name, (module, leaf) in places.items():
            _put(module, leaf, file.get_tensor(name))


def fits(tuned: Tuned, folder: Path) -> bool:
    """Whether a checkpoint has the adapter's tensors, of any sizes: not so when a rule has exchanged parts since."""
    with safe_open(folder / TENSORS, framework="pt") as file:
        return set(file.keys()) == set(_places(tuned, exported=is_exported(folder)))


def is_exported(folder: Path) -> bool:
    """Whether a folder holds an adapter as `dw.save` writes it, instead of a run's state."""
    return (folder / CONFIG).is_file()


def _places(tuned: Tuned, *, exported: bool = False) -> dict[str, tuple[nn.Module, str]]:
    """For every tensor that a file keeps, the module that holds it, and its name there.

    A checkpoint's names are those of `Tuned.tensors`; an `exported` adapter has its own, and only what parts borrow of
    what they share.
    """
    places: dict[str, tuple[nn.Module, str]] = {}
    adapter, lent = tuned.state.adapters[tuned.name], set[str]()
    for (path, label), (name, part) in zip(adapter.places, tuned.named_parts(), strict=True):
        lent |= set(part.borrowed)
        if isinstance(part, Trained):
            parameter = part.site.parameter or "weight"
            full = f"{part.site.path}.{parameter}".lstrip(".")
            places[full] = tuned.model.get_submodule(part.site.path), parameter
        else:
            for inner in part.tensors():
                owner, _, leaf = inner.rpartition(".")
                full = tensor_name(path, label, None, inner) if exported else f"{name}.{inner}"
                places[full] = part.get_submodule(owner), leaf
    for key, module in adapter.shared.items():
        for inner in module.state_dict() if key in lent or not exported else ():
            owner, _, leaf = inner.rpartition(".")
            places[f"@{key}.{inner}" if exported else f"shared.{key}.{inner}"] = module.get_submodule(owner), leaf
    return places


def _put(module: nn.Module, leaf: str, value: Tensor) -> None:
    stored = module._parameters.get(leaf)
    stored = stored if stored is not None else module._buffers[leaf]
    assert stored is not None
    if isinstance(stored, DTensor):
        value = distribute_tensor(value.to(stored.device), stored.device_mesh, stored.placements)
    if stored.shape == value.shape:
        with torch.no_grad():
            stored.copy_(value)
    else:
        # The same tensor object with other content: optimizers and DDP hold on to it. A copy, since products of tensors
        # that lie where they happen to in a file, not aligned, may round otherwise.
        stored.data = value.to(stored.device, stored.dtype, copy=True)


@contextlib.contextmanager
def unsharded(tuned: Tuned) -> Iterator[None]:
    """Within the block an adapter's parameters are whole in every process; every process must enter it."""
    held: list[tuple[nn.Module, str, nn.Parameter]] = []
    try:
        for module, leaf in _places(tuned).values():
            stored = module._parameters.get(leaf)
            if isinstance(stored, DTensor):
                held.append((module, leaf, stored))  # type: ignore[arg-type]
                module._parameters[leaf] = nn.Parameter(whole(stored.detach()), requires_grad=stored.requires_grad)
        yield
    finally:
        for module, leaf, stored in held:
            module._parameters[leaf] = stored


def whole(value: Tensor) -> Tensor:
    """A tensor, gathered from all processes where it is sharded."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def gathered(tree: Any) -> Any:
    """A state dict whose sharded tensors are whole; every process must call it."""
    if isinstance(tree, Tensor):
        return whole(tree)
    if isinstance(tree, dict):
        return {key: gathered(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(gathered(value) for value in tree)
    return tree


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's state, independent of how parameters are sharded."""
    return gathered(optimizer.state_dict())


def restore_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Take up `optimizer_state`'s content, sharded as the parameters are now.

    Raises:
        ValueError: when the state is that of other parameters.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    if len(numbers) != len(parameters):
        raise ValueError(f"the checkpoint's optimizer has {len(numbers)} tensors, the adapter {len(parameters)}")
    for number, parameter in zip(numbers, parameters, strict=True):
        held = state["state"].get(number)
        if held is None or not isinstance(parameter, DTensor):
            continue
        for key, value in held.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                held[key] = distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    optimizer.load_state_dict(state)
    # `load_state_dict` casts floating state to the parameter's dtype; what was kept in another one must stay there.
    for number, parameter in zip(numbers, parameters, strict=True):
        for key, value in state["state"].get(number, {}).items():
            now = optimizer.state[parameter].get(key)
            if isinstance(value, Tensor) and isinstance(now, Tensor) and now.dtype != value.dtype:
                optimizer.state[parameter][key] = value.to(now.device)
