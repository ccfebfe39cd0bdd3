"""A damaged or hostile folder is refused in one line, leaves the model as it was, and executes nothing."""

from __future__ import annotations

import copy
import json
import os
import pickle
import re
import struct
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import deltaworks as dw
from deltaworks.adapters import files
from deltaworks.adapters.peft.targets import Targets
from deltaworks.adapters.reading import Reader
from tests.adapters.adapted import adapted, assert_same, refused, state
from tests.families import FAMILIES

CONFIG, WEIGHTS = "adapter.json", "adapter.safetensors"


@pytest.fixture(scope="module")
def base() -> nn.Module:
    return FAMILIES["mlp"]()[0]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model, _ = adapted("mlp", dw.LoRA(rank=2, on=["first", "second"]))
    return dw.save(model, tmp_path / "adapter")


def _json(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        change(config)
        (folder / CONFIG).write_text(json.dumps(config))

    return damage


def _tensors(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file({name: value.contiguous() for name, value in tensors.items()}, folder / WEIGHTS)

    return damage


def _bytes(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes())) and None


def _header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        raw = (folder / WEIGHTS).read_bytes()
        length = struct.unpack("<Q", raw[:8])[0]
        header = json.loads(raw[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])

    return damage


class Trap:
    """What runs when a pickle of it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def _pickled(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        (folder / name).write_bytes(pickle.dumps(Trap(folder.parent / "sprung"), protocol=4))

    return damage


def _torch_saved(folder: Path) -> None:
    torch.save({"a": torch.ones(2), "trap": Trap(folder.parent / "sprung")}, folder / WEIGHTS)


def _outside(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).rename(folder.parent / "elsewhere")
        (folder / name).symlink_to(folder.parent / "elsewhere")

    return damage


def _dangling(folder: Path) -> None:
    (folder / CONFIG).unlink()
    (folder / CONFIG).symlink_to(folder / "no")


def _folder_instead(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()


def _first(tensors: dict[str, Any]) -> str:
    return next(iter(tensors))


def _set(tensors: dict[str, Any], value: Any) -> None:
    name = _first(tensors)
    tensors[name] = value(tensors[name])


def _deep(folder: Path) -> None:
    (folder / CONFIG).write_text('{"format": ' + "[" * 200_000 + "]" * 200_000 + "}")


CASES: dict[str, tuple[Callable[[Path], None], str]] = {
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "missing"),
    "no json": (lambda folder: (folder / CONFIG).unlink(), "holds no adapter"),
    "empty weights": (_bytes(WEIGHTS, lambda raw: b""), "is empty"),
    "a few bytes of weights": (_bytes(WEIGHTS, lambda raw: raw[:5]), "cut off"),
    "cut in the header": (_bytes(WEIGHTS, lambda raw: raw[:50]), "cut off"),
    "cut in the values": (_bytes(WEIGHTS, lambda raw: raw[:-3]), "cut off"),
    "bytes at the end": (_bytes(WEIGHTS, lambda raw: raw + b"x"), "after the last tensor"),
    "a huge header": (_bytes(WEIGHTS, lambda raw: struct.pack("<Q", 1 << 62) + raw[8:]), "cut off"),
    "a header that is no JSON": (_bytes(WEIGHTS, lambda raw: raw[:8] + b"?" + raw[9:]), "not valid JSON"),
    "a header that is a list": (_bytes(WEIGHTS, lambda raw: struct.pack("<Q", 2) + b"[]"), "one JSON object"),
    "overlapping tensors": (
        _header(
            lambda h: [
                h[k].update(data_offsets=[0, h[k]["data_offsets"][1] - h[k]["data_offsets"][0]])
                for k in h
                if k[0] != "_"
            ]
        ),
        "overlaps",
    ),
    "a false length": (_header(lambda h: h[list(h)[1]].update(data_offsets=[0, 4])), "cannot take"),
    "a negative shape": (_header(lambda h: h[list(h)[1]].update(shape=[-2, -32])), "no possible shape"),
    "an enormous shape": (_header(lambda h: h[list(h)[1]].update(shape=[1 << 40, 1 << 40])), "cannot take"),
    "an unknown dtype": (_header(lambda h: h[list(h)[1]].update(dtype="O")), "dtype 'O'"),
    "a tensor twice": (
        _bytes(WEIGHTS, lambda raw: raw[:8] + raw[8:].replace(b'"first:weight.b"', b'"first:weight.a"', 1)),
        "stands twice",
    ),
    "a pickle as weights": (_pickled(WEIGHTS), "pickle"),
    "a torch archive as weights": (_torch_saved, "zip archive"),
    "a pickle beside": (_pickled("adapter.bin"), "adapter.bin: is a pickle"),
    "weights outside": (_outside(WEIGHTS), "link that leaves"),
    "json outside": (_outside(CONFIG), "link that leaves"),
    "a dangling link": (_dangling, "does not exist"),
    "a folder as weights": (_folder_instead, "is not a file"),
    "broken json": (_bytes(CONFIG, lambda raw: raw[: len(raw) // 2]), "not valid JSON"),
    "empty json": (_bytes(CONFIG, lambda raw: b""), "not valid JSON"),
    "json that is no text": (_bytes(CONFIG, lambda raw: b"\xff\xfe" + raw), "not valid JSON"),
    "json that is a list": (_bytes(CONFIG, lambda raw: b"[]"), "one JSON object"),
    "json nested absurdly": (_deep, "nested too deeply"),
    "a key twice": (_bytes(CONFIG, lambda raw: raw.replace(b'"method"', b'"format": 1, "method"')), "stands twice"),
    "NaN in json": (_bytes(CONFIG, lambda raw: raw.replace(b'"alpha": 16.0', b'"alpha": NaN')), "NaN"),
    "infinity in json": (_bytes(CONFIG, lambda raw: raw.replace(b'"alpha": 16.0', b'"alpha": 1e999')), "too large"),
    "a number of many digits": (
        _bytes(CONFIG, lambda raw: raw.replace(b'"alpha": 16.0', b'"alpha": ' + b"9" * 5000)),
        "digits",
    ),
    "no format": (_json(lambda c: c.pop("format")), "does not describe"),
    "a format of the future": (_json(lambda c: c.update(format=2)), "format 2"),
    "an unknown method": (_json(lambda c: c.update(method="lorra")), "no method 'lorra'"),
    "a method that is no text": (_json(lambda c: c.update(method=["lora"])), "'method'"),
    "an unknown hyper-parameter": (_json(lambda c: c["settings"].update(depth=3)), "no hyper-parameter 'depth'"),
    "a rank of zero": (_json(lambda c: c["settings"].update(rank=0)), "rank=0"),
    "a rank as text": (_json(lambda c: c["settings"].update(rank="2")), "rank='2'"),
    "a dropout above one": (_json(lambda c: c["parts"][0]["settings"].update(dropout=3.0)), "dropout=3.0"),
    "a scale as text": (_json(lambda c: c["parts"][0]["settings"].update(scale="1")), "scale='1'"),
    "settings that are not there": (_json(lambda c: c["parts"][0]["settings"].pop("scale")), "settings"),
    "no parts": (_json(lambda c: c.update(parts=[])), "no parts"),
    "parts that are no list": (_json(lambda c: c.update(parts={})), "'parts'"),
    "an unknown part": (_json(lambda c: c["parts"][0].update(kind="os.system")), "unknown kind"),
    "a part that is none": (
        _json(lambda c: c["parts"][0].update(kind="Wrapper", tensors={}, settings={})),
        "unknown kind",
    ),
    "an unknown module": (_json(lambda c: c["parts"][0].update(path="third")), "no tensor|no module"),
    "a part in a part": (_json(lambda c: c["parts"][0].update(path="first.deltaworks")), "no tensor|not a module"),
    "an unknown parameter": (_json(lambda c: c["parts"][0].update(parameter="scale")), "no parameter"),
    "a part twice": (_json(lambda c: c["parts"].append(c["parts"][0])), "no tensor"),
    "a label that is no name": (_json(lambda c: c["parts"][0].update(label="a.b")), "cannot be called"),
    "another weight's tensors": (_json(lambda c: c["parts"][0].update(path="second", label="other")), "no tensor"),
    "no fingerprint": (_json(lambda c: c["base"].pop("fingerprint")), "which base"),
    "a missing tensor": (_tensors(lambda t: t.pop(_first(t))), "no tensor"),
    "an extra tensor": (_tensors(lambda t: t.update(more=torch.ones(2))), "no part has: more"),
    "a renamed tensor": (_tensors(lambda t: t.update(more=t.pop(_first(t)))), "no tensor"),
    "a transposed tensor": (_tensors(lambda t: _set(t, lambda v: v.T)), "where adapter.json says"),
    "integers": (_tensors(lambda t: _set(t, lambda v: v.long())), "where adapter.json says"),
    "half precision": (_tensors(lambda t: _set(t, lambda v: v.half())), "where adapter.json says"),
    "not a number": (_tensors(lambda t: _set(t, lambda v: v.fill_(torch.nan))), "not finite"),
    "infinity": (_tensors(lambda t: _set(t, lambda v: v.fill_(-torch.inf))), "not finite"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_bad_folder_is_refused(case: str, folder: Path, base: nn.Module) -> None:
    damage, reason = CASES[case]
    damage(folder)
    assert re.search(reason, refused(base, folder))
    assert not (folder.parent / "sprung").exists()


def test_both_files_false_in_the_same_way_are_refused_by_the_models_shapes(folder: Path, base: nn.Module) -> None:
    _tensors(lambda t: t.update({"first:weight.b": torch.ones(7, 2)}))(folder)
    _json(lambda c: c["parts"][0]["tensors"].update(b="F32 7x2"))(folder)
    assert "[48, 32]" in refused(base, folder) and "[7, 32]" in refused(base, folder)


def test_a_small_file_cannot_announce_a_change_that_fills_the_memory(folder: Path, base: nn.Module) -> None:
    wide = 3_000_000
    _tensors(lambda t: t.update({"first:weight.a": torch.ones(1, wide), "first:weight.b": torch.ones(wide, 1)}))(folder)
    _json(lambda c: c["parts"][0]["tensors"].update(a=f"F32 1x{wide}", b=f"F32 {wide}x1"))(folder)
    assert str([wide, wide]) in refused(base, folder)


def test_a_shared_basis_cannot_be_announced_beyond_all_proportion(tmp_path: Path) -> None:
    model, _ = adapted("mlp", dw.VeRA(rank=2, on="first"))
    dw.save(model, tmp_path)
    _json(lambda c: c["shared"]["pair"]["settings"].update(rank=1 << 30))(tmp_path)
    assert "would take" in refused(FAMILIES["mlp"]()[0], tmp_path)


def test_more_values_than_any_adapter_has_are_not_read(folder: Path, base: nn.Module) -> None:
    size = 1 << 40
    text = json.dumps({"a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    with (folder / WEIGHTS).open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + size)  # a hole, which takes no room on the disk
    assert "can have" in refused(base, folder)


@pytest.mark.parametrize("key", ["target_modules", "exclude_modules", "rank_pattern"])
def test_a_pattern_made_to_search_for_ever_is_given_up(key: str, tmp_path: Path) -> None:
    model, _ = adapted("llama", dw.LoRA(rank=2, on="attention.query"))
    dw.save(model, tmp_path, format="peft")
    file = tmp_path / "adapter_config.json"
    pattern = r"(?:(?:[\w.]?){60}){60}[!?]"
    config = json.loads(file.read_text()) | {key: {pattern: 2} if key == "rank_pattern" else pattern}
    file.write_text(json.dumps(config))
    assert "timed out" in refused(FAMILIES["llama"]()[0], tmp_path)


class Counted(str):
    """A name that counts how often any is compared or hashed."""

    uses = 0

    def __eq__(self, other: object) -> bool:
        Counted.uses += 1
        return str.__eq__(self, other)

    def __hash__(self) -> int:
        Counted.uses += 1
        return str.__hash__(self)


def _uses(check: Callable[[list[str]], Any], number: int) -> int:
    names = [Counted(f"name{index}") for index in range(number)]
    Counted.uses = 0
    check(names)
    return Counted.uses


def _doubled(names: list[str]) -> None:
    with pytest.raises(ValueError, match="'name0' stands twice"):
        files._unique([(name, 0) for name in [*reversed(names), names[0]]])


NAME_CHECKS: dict[str, Callable[[list[str]], Any]] = {
    "a key that stands twice": _doubled,
    "a place that stands twice": lambda names: files.twice((name, "weight") for name in [*reversed(names), names[0]]),
    "names of target modules": lambda names: Targets(names).chosen(FAMILIES["mlp"]()[0]),
    "names of other modules": lambda names: Targets("first", names).chosen(FAMILIES["mlp"]()[0]),
    "names of modules to save": lambda names: Targets("first", modules_to_save=names).chosen(FAMILIES["mlp"]()[0]),
}


@pytest.mark.parametrize("check", NAME_CHECKS)
def test_twice_the_names_are_twice_the_work(check: str) -> None:
    few, many = (_uses(NAME_CHECKS[check], number) for number in (500, 1000))
    assert few <= 8 * 500 and many <= 2.1 * few


class CountedModules(nn.Module):
    """A model that counts how often its modules are gone through."""

    walks = 0

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def modules(self) -> Iterator[nn.Module]:
        self.walks += 1
        return super().modules()


def test_the_models_modules_are_not_gone_through_for_every_entry(folder: Path, base: nn.Module) -> None:
    model = CountedModules(base)
    reader = Reader(model, folder, json.loads((folder / CONFIG).read_text()), {})
    model.walks = 0
    kind = {"type": f"{nn.Linear.__module__}.Linear"}
    assert reader.restored([kind] * 50, None) == [nn.Linear] * 50
    assert model.walks == 1


def test_a_folder_that_is_not_one(tmp_path: Path, base: nn.Module) -> None:
    (tmp_path / "file").write_text("x")
    assert "no such folder" in refused(base, tmp_path / "nothing")
    assert "is a file" in refused(base, tmp_path / "file")
    assert "holds no adapter" in refused(base, tmp_path)


def test_links_of_a_download_cache_are_followed(folder: Path, base: nn.Module) -> None:
    snapshot = folder.parent / "models--a--b" / "snapshots" / "1234"
    blobs = snapshot.parent.parent / "blobs"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, name in enumerate((CONFIG, WEIGHTS)):
        (folder / name).rename(blobs / str(number))
        (snapshot / name).symlink_to(os.path.relpath(blobs / str(number), snapshot))
    dw.load(base, snapshot)
    dw.detach(base)


# Mutations of real adapters.

SUBJECTS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "lora": ("mlp", dw.LoRA(rank=2, on=["first", "second"]), {}),
    "overrides": ("mlp", dw.LoRA(rank=2, on=["first", nn.Linear], overrides={"first": {"rank": 3}}), {}),
    "experts": ("mixtral", dw.LoRA(rank=2, on="expert.down"), {}),
    "parts": ("phi3", dw.LoRA(rank=2, on="attention.query"), {}),
    "dora": ("mlp", dw.DoRA(rank=2, on="second"), {}),
    "shared": ("mlp", dw.VeRA(rank=2, on="first|second"), {}),
    "integers": ("mlp", dw.FourierFT(n=5, on="first"), {}),
    "circulant": ("mlp", dw.C3A(on="first"), {}),
    "modules": ("bert", dw.Pfeiffer(), {}),
    "trained": ("mlp", dw.LoRA(rank=2, on="first"), {"also": "last"}),
    "rotated": ("mlp", dw.OFT(block=8, on="first"), {}),
    "butterfly": ("mlp", dw.BOFT(on="first"), {}),
    "reflected": ("mlp", dw.HRA(rank=2, on="first"), {}),
    "hadamard": ("mlp", dw.LoHa(rank=2, on="first"), {}),
    "kronecker": ("mlp", dw.LoKr(rank=2, on="first"), {}),
    "tiled": ("mlp", dw.MiSS(rank=4, on="first"), {}),
    "bases": ("mlp", dw.RandLoRA(rank=8, on="first"), {}),
    "general": ("mlp", dw.GLoRA(rank=2, on="first"), {}),
}
PEFT_SUBJECTS = (
    *("lora", "experts", "parts", "dora", "shared", "integers", "circulant", "trained", "rotated", "butterfly"),
    *("reflected", "hadamard", "kronecker", "tiled", "bases", "general"),
)
_KNOWN: dict[tuple[str, str], tuple[nn.Module, dict[str, bytes], dict[str, Any]]] = {}


def _subject(name: str, format: str, folder: Path) -> tuple[nn.Module, dict[str, bytes], dict[str, Any]]:
    """A base, the files of an adapter for it, and the base's exact state; made once."""
    if (name, format) not in _KNOWN:
        family, method, more = SUBJECTS[name]
        model, _ = adapted(family, method, **more)
        dw.save(model, folder, format=format)  # type: ignore[arg-type]
        content = {file.name: file.read_bytes() for file in folder.iterdir()}
        fresh, _ = FAMILIES[family]()
        _KNOWN[name, format] = fresh, content, state(fresh)
    return _KNOWN[name, format]


SCALARS = st.none() | st.booleans() | st.integers(-3, 70) | st.floats(allow_nan=False) | st.text(max_size=8)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner), max_leaves=5
)


def _mutate_json(data: st.DataObject, raw: bytes) -> bytes:
    config = json.loads(raw)
    owner: Any = config
    while True:
        keys = list(owner) if isinstance(owner, dict) else range(len(owner))
        key = data.draw(st.sampled_from(list(keys)))
        inner = owner[key]
        if not isinstance(inner, (dict, list)) or not inner or data.draw(st.booleans()):
            break
        owner = inner
    kind = data.draw(st.sampled_from(["replace", "delete", "rename", "near"]))
    if kind == "replace":
        owner[key] = data.draw(VALUES)
    elif kind == "delete":
        del owner[key]
    elif kind == "rename" and isinstance(owner, dict):
        owner[data.draw(st.text(max_size=6))] = owner.pop(key)
    elif isinstance(inner, (int, float)):
        owner[key] = inner + data.draw(st.sampled_from([-1, 1, 0.5, 1000]))
    elif isinstance(inner, list) and inner:
        inner.append(copy.deepcopy(inner[0]))
    return json.dumps(config).encode()


def _mutate_tensors(data: st.DataObject, folder: Path, raw: bytes) -> bytes:
    from safetensors.torch import load, save

    tensors = load(raw)
    name = data.draw(st.sampled_from(sorted(tensors)))
    value = tensors[name]
    kind = data.draw(st.sampled_from(["dtype", "shape", "value", "drop", "rename", "add", "transpose"]))
    if kind == "dtype":
        dtypes = [torch.int64, torch.float16, torch.bfloat16, torch.float64, torch.uint8, torch.bool, torch.float32]
        tensors[name] = value.to(data.draw(st.sampled_from(dtypes)))
    elif kind == "shape":
        size = data.draw(
            st.sampled_from([(), (0,), (1,), (2, 2), (*value.shape, 1), value.shape[1:], (3, *value.shape)])
        )
        tensors[name] = torch.ones(size, dtype=value.dtype)
    elif kind == "value" and value.is_floating_point() and value.numel():
        value.view(-1)[data.draw(st.integers(0, value.numel() - 1))] = data.draw(
            st.sampled_from([torch.nan, torch.inf, -torch.inf, 3e38])
        )
    elif kind == "drop":
        del tensors[name]
    elif kind == "rename":
        tensors[data.draw(st.text("abw.:@_", max_size=10))] = tensors.pop(name)
    elif kind == "add":
        tensors[data.draw(st.text("abw.:@_", min_size=1, max_size=10))] = torch.ones(2)
    else:
        tensors[name] = value.movedim(0, -1) if value.dim() else value
    return save({key: item.contiguous() for key, item in tensors.items()})


def _mutate_bytes(data: st.DataObject, raw: bytes) -> bytes:
    at = data.draw(st.integers(0, max(len(raw) - 1, 0)))
    if data.draw(st.booleans()):
        at = at % 400  # where headers are
    kind = data.draw(st.sampled_from(["flip", "cut", "insert", "remove"]))
    if kind == "flip":
        return (
            raw[:at] + bytes([raw[at] ^ (1 << data.draw(st.integers(0, 7)))]) + raw[at + 1 :] if at < len(raw) else raw
        )
    if kind == "cut":
        return raw[:at]
    if kind == "insert":
        return raw[:at] + data.draw(st.binary(min_size=1, max_size=9)) + raw[at:]
    return raw[:at] + raw[at + data.draw(st.integers(1, 20)) :]


@pytest.mark.parametrize("format", ["deltaworks", "peft"])
@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(data=st.data())
def test_a_mutated_adapter_loads_as_a_sound_one_or_is_refused(
    format: str, tmp_path_factory: Any, data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from(sorted(SUBJECTS) if format == "deltaworks" else PEFT_SUBJECTS))
    model, content, before = _subject(name, format, tmp_path_factory.mktemp("made") / "adapter")
    folder = tmp_path_factory.mktemp("mutated")
    which = data.draw(st.sampled_from(["bytes", "json", "tensors"]))
    mutated = dict(content)
    config, weights = (next(key for key in content if key.endswith(end)) for end in ("json", "safetensors"))
    if which == "json":
        mutated[config] = _mutate_json(data, content[config])
    elif which == "tensors":
        mutated[weights] = _mutate_tensors(data, folder, content[weights])
    else:
        key = data.draw(st.sampled_from([config, weights]))
        mutated[key] = _mutate_bytes(data, content[key])
    for key, raw in mutated.items():
        (folder / key).write_bytes(raw)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            tuned = dw.load(model, folder)
        except (ValueError, OSError) as error:
            assert "\n" not in str(error) and str(folder) in str(error)
        else:
            assert all(torch.isfinite(value).all() for value in tuned.tensors().values() if value.is_floating_point())
            for path, part in tuned.named_parts():
                if hasattr(part, "dense") and part.additive:
                    assert torch.isfinite(part.dense()).all() or which != "bytes", path
            dw.detach(model)
    assert_same(model, before)
