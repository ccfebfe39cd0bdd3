"""Reading files nobody vouches for, and replacing a folder in one step.

What is read here may be damaged or hostile: sizes, nesting, links and file types are checked before anything is used,
nothing is unpickled, and every refusal is one line that names the file. What is written appears at its place complete
and flushed to the disk, or not at all.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

try:
    import fcntl
except ImportError:  # not a POSIX system: nothing is locked, and leftovers stay
    fcntl = None

CONFIG, WEIGHTS = "adapter.json", "adapter.safetensors"
PEFT_CONFIG, PEFT_WEIGHTS, PEFT_PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
OWN = (CONFIG, WEIGHTS, PEFT_CONFIG, PEFT_WEIGHTS, PEFT_PICKLE)
"""Files of an adapter, in any format; a folder holds those of one."""
JSON_LIMIT = 64 << 20
"""Largest JSON file that is read, in bytes; real ones have some kilobytes."""
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_EXCHANGE = 2  # renameat2's RENAME_EXCHANGE
_HERE = -100  # AT_FDCWD
Name = TypeVar("Name", bound=Hashable)


def refuse(file: Path | str, reason: object) -> NoReturn:
    """Raise the one error a bad file gives: its name and the reason, in one line."""
    text = " ".join(str(reason).split())
    raise ValueError(f"{file}: {text if len(text) <= 400 else text[:397] + '...'}")


def inside(folder: Path, name: str) -> Path | None:
    """The file `name` of a folder, its links followed; None when there is none.

    Raises:
        ValueError: for a link that leads out of the folder, and for anything that is not a plain file.
    """
    file = folder / name
    if not os.path.lexists(file):
        return None
    real, home = file.resolve(), folder.resolve()
    if not any(real.is_relative_to(root) for root in (home, *_cache(home))):
        refuse(file, f"is a link that leaves its folder, to {real}; copy the file itself")
    if not real.exists():
        refuse(file, f"is a link to {real}, which does not exist")
    if not stat.S_ISREG(real.stat().st_mode):
        refuse(file, "is not a file")
    return real


def _cache(home: Path) -> Iterable[Path]:
    # A download of huggingface_hub is a folder of links into the blobs of the same repository.
    if home.parent.name == "snapshots" and home.parent.parent.name.startswith("models--"):
        yield home.parent.parent / "blobs"


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file that is one object, read strictly: no doubled keys, no values that are not finite.

    Raises:
        ValueError: when it is anything else.
    """
    size = file.stat().st_size
    if size > JSON_LIMIT:
        refuse(file, f"has {size:,} bytes; at most {JSON_LIMIT:,} are read")
    return parse_object(file, file.read_bytes())


def parse_object(file: Path, text: bytes) -> dict[str, Any]:
    """`text` as one JSON object; `file` is what an error names."""
    try:
        found = json.loads(
            text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite
        )
    except RecursionError:
        refuse(file, "is nested too deeply")
    except ValueError as error:
        refuse(file, f"is not valid JSON: {error}")
    if not isinstance(found, dict):
        refuse(file, f"must hold one JSON object, not {type(found).__name__}")
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError(f"the key {twice(name for name, _ in pairs)!r} stands twice in one object")
    return found


def twice(names: Iterable[Name]) -> Name | None:
    """The first name that has stood before; None where all differ. Costs as much as there are names."""
    seen: set[Name] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is too large for a number")
    return value


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write one object, indented, the same bytes for the same content."""
    file.write_text(json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


class Replacement:
    """A folder being written beside `target`, which takes its place when everything is on the disk.

    Used as a context manager: the block fills `folder`; when it ends without an error the folder becomes `target` in
    one step of the file system, otherwise it disappears. Files in an existing `target` that are not called by one of
    `own` stay. A target that cannot be exchanged, because it is a mount point or somebody stands in it, gets the files
    one by one, the description last: at no moment does it describe what is not there. What a process that was killed
    left beside a target goes when the next one writes there; folders of processes that live are locked.
    """

    def __init__(self, target: Path | str, own: Iterable[str]) -> None:
        self.target, self.own = Path(os.path.abspath(target)), set(own)

    def __enter__(self) -> Path:
        if os.path.lexists(self.target) and not self.target.is_dir():
            raise FileExistsError(f"{self.target}: is a file; an adapter is saved as a folder")
        if self.target.is_symlink():
            self.target = self.target.resolve()
        self.target.parent.mkdir(parents=True, exist_ok=True)
        self.beside = os.access(self.target.parent, os.W_OK) and not Path.cwd().is_relative_to(self.target)
        place = self.target.parent if self.beside else self.target
        place_lock = _lock(place, wait=True)  # a folder that is not locked yet must not be taken for a leftover
        try:
            if place_lock is not None:
                self._sweep(place)
            self.folder = Path(tempfile.mkdtemp(prefix=f".{self.target.name}.", suffix=".new", dir=place))
            self.lock = _lock(self.folder)
        finally:
            _unlock(place_lock)
        return self.folder

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            if kind is None:
                self._commit()
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)
            _unlock(self.lock)

    def _sweep(self, place: Path) -> None:
        """Remove what killed processes left of this target, and put a target back that one had set aside."""
        name = re.compile(rf"\.{re.escape(self.target.name)}\.[a-z0-9_]{{8}}\.(new|old)")
        for left in sorted((item for item in place.iterdir() if name.fullmatch(item.name)), reverse=True):
            new = left.with_suffix(".new")
            lock = _lock(new)
            if lock is None and new.is_dir():
                continue  # somebody is writing it
            if left.suffix == ".old" and not os.path.lexists(self.target):
                os.rename(left, self.target)
            shutil.rmtree(left, ignore_errors=True)
            _unlock(lock)

    def _commit(self) -> None:
        there = self.target.is_dir()
        for file in self.folder.iterdir():
            _flush(file)
        if there and not self.beside:
            return self._one_by_one()
        if there:
            self._keep_others()
        mask = os.umask(0)
        os.umask(mask)
        self.folder.chmod(stat.S_IMODE(self.target.stat().st_mode) if there else 0o777 & ~mask)
        _flush(self.folder)
        if not there:
            os.rename(self.folder, self.target)
        elif not exchange(self.folder, self.target):
            self._swap()
        _flush(self.target.parent)

    def _swap(self) -> None:
        # Without an exchange in one step: the old folder is complete until it is set aside, the new one from then.
        aside = self.folder.with_suffix(".old")
        try:
            os.rename(self.target, aside)
        except OSError:
            return self._one_by_one()
        os.rename(self.folder, self.target)
        shutil.rmtree(aside, ignore_errors=True)

    def _one_by_one(self) -> None:
        mine = [file for file in self.folder.iterdir() if file.name in self.own or not self.own]
        new = sorted(mine, key=lambda file: file.suffix == ".json")
        for file in new:
            shutil.copy2(file, self.target / f".{file.name}.new")
            _flush(self.target / f".{file.name}.new")
        for name in sorted(self.own, key=lambda name: not name.endswith(".json")):
            (self.target / name).unlink(missing_ok=True)
        for file in new:
            os.replace(self.target / f".{file.name}.new", self.target / file.name)
        _flush(self.target)

    def _keep_others(self) -> None:
        for item in self.target.iterdir():
            if item.name in self.own:
                continue
            new = self.folder / item.name
            if item.is_symlink():
                new.symlink_to(os.readlink(item))
            elif item.is_dir():
                shutil.copytree(item, new, symlinks=True, copy_function=_link)
            else:
                _link(str(item), str(new))


def _lock(folder: Path, *, wait: bool = False) -> int | None:
    """Lock a folder until its handle is closed or the process ends; None where that cannot be or somebody has it."""
    if fcntl is None:
        return None
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        os.close(handle)
        return None
    return handle


def _unlock(handle: int | None) -> None:
    if handle is not None:
        os.close(handle)


def _link(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return target


def _flush(path: Path) -> None:
    if os.name == "nt":
        return  # folders cannot be flushed there, and files are when they are closed
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step; False where the system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    return rename is not None and rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0
