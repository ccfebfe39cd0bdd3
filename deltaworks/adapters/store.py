"""Save, load, inspect: one adapter, one folder."""

from __future__ import annotations

import warnings
from importlib.metadata import PackageNotFoundError, version
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ..core.attach import find_state, install, tuned
from ..core.part import Delta, Trained, in_place
from ..core.tuned import Tuned
from ..model.anatomy import describe
from . import native, reading, starts
from .files import (
    CONFIG,
    OWN,
    PEFT_CONFIG,
    PEFT_WEIGHTS,
    PICKLES,
    WEIGHTS,
    Replacement,
    inside,
    read_json,
    refuse,
    write_json,
)
from .fingerprint import fingerprint, same
from .weights import read_header, read_tensors, whole, write_tensors


def library_version() -> str:
    """The installed version of this library."""
    try:
        return version("deltaworks")
    except PackageNotFoundError:
        return "0.0.0"


def save(
    model: nn.Module | Tuned,
    path: str | Path,
    *,
    name: str | None = None,
    format: Literal["deltaworks", "peft", "vllm"] = "deltaworks",
    start: Literal["values", "recompute"] = "values",
) -> Path:
    """Write one adapter of a model as a folder of one JSON and one safetensors file.

    An adapter that is already there is replaced whole or, if anything fails, not at all; other files stay. A sharded
    model is saved by all its processes together, of which the first writes.

    Args:
        model: the adapted model, or the handle `attach` gave.
        path: the folder.
        name: which adapter; the last one attached when there are several and none is named.
        format: "deltaworks", "peft" for HF PEFT's files, or "vllm" for the plainest of those: a LoRA of one rank that
            loses nothing (`adapters.export` takes a rank to approximate other changes with).
        start: what becomes of the factors a method starts from and subtracts (PiSSA, OLoRA, ...), in our own format:
            "values" holds them, so that the file needs nothing else; "recompute" leaves them out, half of the file, and
            `load` makes them again from the seed, on the same base and the same kind of machine or not at all.

    Returns:
        The folder.

    Raises:
        ValueError: when nothing is attached, values are not finite, PEFT's format cannot express the adapter, or its
            starts cannot be made again.
        OSError: when the folder cannot be written.
    """
    handle = model if isinstance(model, Tuned) and name is None else tuned(_model(model), name)
    if format not in ("deltaworks", "peft", "vllm"):
        raise ValueError(f'there is no format {format!r}; take "deltaworks", "peft" or "vllm"')
    if start not in ("values", "recompute") or (start == "recompute" and format != "deltaworks"):
        raise ValueError(f'start={start!r} is not known for format={format!r}; "values" or, in our own, "recompute"')
    if format == "vllm":
        from .vllm import export

        return export(handle, path).path
    if format == "peft":
        from .peft import write

        config, tensors = write(handle)
        names = (PEFT_CONFIG, PEFT_WEIGHTS)
    else:
        config, tensors = native.describe_adapter(handle.model, handle.name, library_version())
        if start == "recompute":
            starts.leave_out(handle, config, tensors)
        names = (CONFIG, WEIGHTS)
    if any(hasattr(value, "full_tensor") for value in tensors.values()):
        # Sharded: every process helps to gather, one writes.
        tensors = {key: whole(value) for key, value in tensors.items()}
        if torch.distributed.get_rank() != 0:
            return Path(path)
    with Replacement(path, OWN) as folder:
        write_json(folder / names[0], config)
        write_tensors(folder / names[1], tensors)
    return Path(path)


def load(model: nn.Module, path: str | Path, *, name: str | None = None) -> Tuned:
    """Attach the adapter a folder holds, in Deltaworks' or in PEFT's format.

    Nothing in the folder is trusted: it is verified as a whole first, and nothing in it is executed or unpickled.

    Args:
        model: the base, or a model that has adapters already.
        path: the folder.
        name: the adapter's name in the model, "default" without one.

    Returns:
        A handle on the adapter.

    Raises:
        ValueError: one line naming the file and what is wrong with it; the model is then as it was.
        OSError: when the folder cannot be read.
    """
    model = _model(model)
    state = find_state(model)
    if state is not None and state.board.merged:
        raise ValueError(f"{', '.join(state.board.merged)} is merged into the base; call dw.unmerge(model) first")
    folder = _folder(path)
    try:
        plan, doubt = _verified(model, folder)
    except (ValueError, OSError) as error:
        if str(folder) in str(error):
            raise
        refuse(folder, error)
    except Exception as error:  # whatever false content makes of code that expects sound one
        refuse(folder, f"cannot be read: {type(error).__name__}: {error}")
    handle = install(model, plan.method, plan.placed, plan.shared, name=name or "default")
    handle.state.adapters[handle.name].seed = plan.seed
    if doubt:
        warnings.warn(doubt, stacklevel=2)
    return handle


def inspect(path: str | Path) -> dict[str, Any]:
    """What a folder holds, without a model and without reading any value.

    Returns:
        `format` ("deltaworks" or "peft"), `path`, `method`, `settings`, `base`, `library`, `parts` (path, kind and
        tensors of each), `tensors` (name -> dtype and shape), `values` (how many numbers) and `bytes` (of both files).

    Raises:
        ValueError, OSError: as `load`, as far as it can be told without a model.
    """
    folder = _folder(path)
    kind = _format(folder)
    files = [
        _file(folder, name) for name in ((CONFIG, WEIGHTS) if kind == "deltaworks" else (PEFT_CONFIG, PEFT_WEIGHTS))
    ]
    config, header = read_json(files[0]), read_header(files[1])
    about: dict[str, Any] = {"format": kind, "path": str(folder)}
    if kind == "deltaworks":
        reading.check_head(folder / CONFIG, config)
        about |= {key: config.get(key) for key in ("method", "settings", "base", "library", "parts")}
    else:
        known = {key: config.get(key) for key in ("peft_type", "peft_version", "base_model_name_or_path")}
        about |= {
            "method": str(known["peft_type"]).lower(),
            "settings": config,
            "base": {"name": known["base_model_name_or_path"]},
            "library": f"peft {known['peft_version']}" if known["peft_version"] else "peft",
            "parts": [],
        }
    about["tensors"] = {name: f"{e.dtype} {'x'.join(map(str, e.shape)) or 'scalar'}" for name, e in header.items()}
    about["values"] = sum(prod(entry.shape) for entry in header.values())
    about["bytes"] = sum(file.stat().st_size for file in files)
    return about


def _verified(model: nn.Module, folder: Path) -> tuple[reading.Plan, str | None]:
    """The adapter in a folder, and what speaks against its belonging to this model."""
    # No adapter is much larger than its base; small bases may have relatively large ones.
    limit = 4 * sum(value.numel() * value.element_size() for value in model.parameters()) + (1 << 28)
    if _format(folder) == "deltaworks":
        config = read_json(_file(folder, CONFIG))
        plan = reading.Reader(model, folder, config, read_tensors(_file(folder, WEIGHTS), limit)).plan()
        return plan, _another_base(model, folder, config["base"], plan)
    from .peft import read

    config = read_json(_file(folder, PEFT_CONFIG))
    return read(model, folder, config, read_tensors(_file(folder, PEFT_WEIGHTS), limit)), None


def _model(model: nn.Module | Tuned) -> nn.Module:
    return model.model if isinstance(model, Tuned) else model


def _folder(path: str | Path) -> Path:
    folder = Path(path)
    if not folder.exists():
        raise FileNotFoundError(f"{folder}: there is no such folder; give the folder that dw.save wrote")
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder}: is a file; give the folder that dw.save wrote")
    return folder


def _format(folder: Path) -> Literal["deltaworks", "peft"]:
    if (folder / CONFIG).exists() or (folder / CONFIG).is_symlink():
        return "deltaworks"
    if (folder / PEFT_CONFIG).exists() or (folder / PEFT_CONFIG).is_symlink():
        return "peft"
    found = ", ".join(sorted(item.name for item in folder.iterdir())[:5]) or "nothing"
    refuse(folder, f"holds no adapter: neither {CONFIG} nor {PEFT_CONFIG} (found: {found})")


def _file(folder: Path, name: str) -> Path:
    """A file of the adapter, links followed; a pickle in its place is refused by name."""
    file = inside(folder, name)
    if file is None:
        pickles = sorted(item.name for item in folder.iterdir() if item.suffix in PICKLES)
        if pickles and name.endswith(".safetensors"):
            refuse(
                folder / pickles[0], f"is a pickle, which can run code when it is opened; {name} is needed: convert it"
            )
        raise FileNotFoundError(f"{folder / name}: is missing")
    return file


def _another_base(model: nn.Module, folder: Path, base: dict[str, Any], plan: reading.Plan) -> str | None:
    """A warning when the adapter was trained on other weights; an error when its activations cannot fit."""
    here = fingerprint(model, [item.site for item in plan.placed if in_place(item.part, item.site)])
    if same(here, base["fingerprint"]):
        return None
    wide = describe(model).hidden_size
    loose = [item for item in plan.placed if not isinstance(item.part, (Delta, Trained))]
    if loose and base.get("hidden_size") != wide:
        refuse(folder / CONFIG, f"was made for a base of width {base.get('hidden_size')}, this one has {wide}")
    return (
        f"{folder}: this adapter was trained on other weights than those of the model "
        f"({base.get('name') or base.get('class')}, fingerprint {base['fingerprint']}, here {here})"
    )
