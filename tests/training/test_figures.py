"""Figures of merit, memory, and the pictures of the report."""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import os
import re
import sys
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments

from deltaworks.data import Labels
from deltaworks.data.collate import ChoiceCollator
from deltaworks.data.packing import padding_collator
from deltaworks.training import report
from deltaworks.training.evaluation import batches, by_length, merit
from deltaworks.training.memory import PeakMemory, _resident, keeping_freed


def test_rows_of_like_length_are_evaluated_together_and_none_twice() -> None:
    lengths = [3, 40, 5, 4, 20, 3, 4, 5, 21, 3]
    rows = [{"input_ids": [index] * n, "labels": [-100] + [index] * (n - 1)} for index, n in enumerate(lengths)]
    data = Dataset.from_list([{"input_ids": [99] * 90, "labels": [99] * 90}, *rows]).select(range(1, 11))
    plain, near = (
        [batch["input_ids"] for batch in made(data, padding_collator(0), 2, "cpu")] for made in (batches, by_length)
    )
    assert sorted(int(row[0]) for batch in near for row in batch) == list(range(10))
    assert len(near) < len(plain) == 5 and sum(map(torch.numel, near)) < sum(map(torch.numel, plain))
    assert max(map(torch.numel, near)) <= 2 * 40, "no more than training must take"
    assert [batch.shape[1] for batch in near] == [40, 20, 4]


def test_a_question_costs_all_its_choices() -> None:
    rows = [{"input_ids": [1] * 12, "labels": [1] * 12, "lengths": [6, 6], "answer": 0}] * 2
    rows += [{"input_ids": [1] * 15, "labels": [1] * 15, "lengths": [1, 1, 1, 12], "answer": 0}]
    shapes = [
        tuple(batch["input_ids"].shape) for batch in by_length(Dataset.from_list(rows), ChoiceCollator(0), 1, "cpu")
    ]
    assert shapes == [(4, 12), (4, 6)]


def test_classes_are_scored_as_scikit_learn_does() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    logits = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    truth = torch.randint(0, 3, (40,), generator=torch.Generator().manual_seed(1))  # class 3 is only ever guessed
    found = merit("sequence-classification", labels("abcd"), list(logits), list(truth))
    guess = logits.argmax(-1)
    assert found["accuracy"] == pytest.approx(metrics.accuracy_score(truth, guess))
    assert found["f1"] == pytest.approx(metrics.f1_score(truth, guess, average="macro", labels=[0, 1, 2]))
    areas = [metrics.roc_auc_score(truth == index, logits.softmax(-1)[:, index]) for index in range(3)]
    assert found["auc"] == pytest.approx(sum(areas) / 3)


def test_several_classes_are_scored_together() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    logits = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    truth = torch.randint(0, 2, (30, 4), generator=torch.Generator().manual_seed(1)).float()
    kind = Labels("multi_label_classification", tuple("abcd"))
    found = merit("sequence-classification", kind, list(logits), list(truth))
    assert found["f1"] == pytest.approx(metrics.f1_score(truth, logits > 0, average="micro"))
    assert found["macro_f1"] == pytest.approx(metrics.f1_score(truth, logits > 0, average="macro"))
    assert found["exact"] == pytest.approx(metrics.accuracy_score(truth, logits > 0))
    assert found["auc"] == pytest.approx(metrics.roc_auc_score(truth, logits, average="macro"))


def test_classes_that_do_not_occur_count_for_none() -> None:
    kind = Labels("multi_label_classification", tuple("abc"))
    truth = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 0.0]])
    found = merit("sequence-classification", kind, [torch.tensor([1.0, 1.0, -1.0])] * 2, list(truth))
    assert found["macro_f1"] == pytest.approx((2 / 3 + 1) / 2), "the third class has no example"
    assert found["auc"] == 0.5, "a tie in the only class that can be ranked"
    nothing = merit("sequence-classification", kind, [-torch.ones(3)], [torch.zeros(3)])
    assert (nothing["f1"], nothing["macro_f1"], nothing["auc"]) == (1.0, 1.0, 0.5)


def test_numbers_are_scored() -> None:
    kind = Labels("regression", ("value",))
    truth = torch.tensor([1.0, 2.0, 4.0])
    found = merit("regression", kind, list((2 * truth + 1)[:, None]), list(truth))
    assert found["pearson"] == pytest.approx(1.0)
    assert found["mae"] == pytest.approx((2 + 3 + 5) / 3)
    assert found["rmse"] == pytest.approx(math.sqrt((4 + 9 + 25) / 3))
    assert merit("regression", kind, [torch.tensor([3.0])] * 3, list(truth))["pearson"] == 0, "a constant knows nothing"


def labels(names: Any) -> Labels:
    return Labels("single_label_classification", tuple(names))


def test_spans_count_only_whole() -> None:
    names = ["O", "B-X", "I-X", "B-Y"]
    truth = torch.tensor([1, 2, 0, 3, 1, -100])
    guess = torch.tensor([1, 2, 0, 3, 0, 1])
    logits = torch.nn.functional.one_hot(guess, 4).float()
    longer = torch.cat([logits, torch.zeros(2, 4)])  # a batch pads to its longest row
    found = merit("token-classification", labels(names), [longer], [truth])
    assert found["accuracy"] == pytest.approx(4 / 5)
    assert found["span_f1"] == pytest.approx(2 * 2 / (2 + 3))
    shorter = torch.nn.functional.one_hot(torch.tensor([1, 0, 0, 3, 1, 0]), 4).float()
    assert merit("token-classification", labels(names), [shorter], [truth])["span_f1"] == pytest.approx(2 * 2 / (3 + 3))


def test_peak_memory_sees_what_was_given_back() -> None:
    memory = PeakMemory("cpu")
    with mmap.mmap(-1, 64_000_000) as held:  # the C library may keep what it frees; the system does not
        held[::4096] = b"1" * 15_625
    peak = memory.bytes()
    assert peak > 50e6, "64 MB were held for a moment"
    memory.forget()
    assert memory.bytes() < peak - 40e6


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="another C library than glibc"
)
def test_memory_freed_on_a_cpu_is_kept_for_the_next_step_and_given_back_at_the_end(monkeypatch) -> None:
    for name in [name for name in os.environ if name.startswith("MALLOC_") or name == "GLIBC_TUNABLES"]:
        monkeypatch.delenv(name)

    def use() -> int:
        pieces = [torch.ones(1 << 20) for _ in range(50)]
        del pieces
        return _resident("VmRSS") or 0

    ctypes.CDLL(None).malloc_trim(0)
    before = _resident("VmRSS") or 0
    with pytest.raises(KeyError), keeping_freed("cpu"):
        with keeping_freed("cpu"):  # as a trainer's within a loop of one's own
            use()
        inside = use()
        assert inside > before + 150e6, "kept until the outer end"
        raise KeyError
    assert (_resident("VmRSS") or 0) < inside - 100e6


def test_trainers_that_wrap_makes_keep_what_is_freed(monkeypatch, tmp_path) -> None:
    import deltaworks as dw
    from deltaworks.training import mixin

    held = []

    @contextlib.contextmanager
    def keeping(device):
        held.append(str(device))
        yield
        held.append("end")

    class Plain(Trainer):
        def __init__(self):
            self.args = TrainingArguments(str(tmp_path), use_cpu=True)

        def train(self):
            return tuple(held)

    monkeypatch.setattr(mixin, "keeping_freed", keeping)
    trainer = object.__new__(dw.training.wrap(Plain))
    Plain.__init__(trainer)
    assert trainer.train() == ("cpu",) and held == ["cpu", "end"]


def test_memory_is_left_to_the_environment_and_to_gpus(monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(ctypes, "CDLL", lambda *_: asked.append(1))
    for device, name in (("cuda", "UNRELATED"), ("cpu", "MALLOC_TRIM_THRESHOLD_"), ("cpu", "GLIBC_TUNABLES")):
        with monkeypatch.context() as around:
            around.setenv(name, "1000")
            with keeping_freed(device):
                assert not asked


PICTURES = {
    "curve": report.lines({"a": [(1, 2.0), (2, 1.5), (3, math.nan)]}, "step", "loss"),
    "point": report.lines({"a": [(5, 2.0)]}, "step", "loss"),
    "flat": report.lines({"a <&>": [(0, 0.0), (1, 0.0)]}, "step", "loss"),
    "raster": report.raster([(step, {f"layers.{i}": float(i * step) for i in range(12)}) for step in range(500)]),
    "many": report.raster([(1, {f"place {i}": 1.0 for i in range(200)})]),
}


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_are_well_formed_and_stay_inside(name: str) -> None:
    picture = re.sub(r"</svg>.*", "</svg>", PICTURES[name])
    root = ElementTree.fromstring(picture)
    width, height = (float(side) for side in root.attrib["viewBox"].split()[2:])
    for item in root.iter():
        for key, bound in (("x", width), ("cx", width), ("y", height), ("cy", height)):
            assert -1 <= float(item.attrib.get(key, 0)) <= bound + 1
        for point in item.attrib.get("points", "").split():
            x, y = map(float, point.split(","))
            assert 0 <= x <= width and 0 <= y <= height
    assert len(list(root.iter())) < 10_000


def test_rows_of_a_raster_stand_in_natural_order() -> None:
    order = [PICTURES["raster"].index(f">layers.{i}<") for i in range(12)]
    assert order == sorted(order)
    assert "136 more places are not shown" in PICTURES["many"]


def test_a_raster_is_to_scale_in_time_and_says_what_its_shades_mean() -> None:
    ranks = [(1, {"m.0.q.w": 1, "m.1.q.w": 1}), (3, {"m.0.q.w": 3, "m.1.q.w": 1}), (11, {"m.0.q.w": 3, "m.1.q.w": 2})]
    picture, _, rest = report.raster(ranks, "ranks").partition("</svg>")
    root = ElementTree.fromstring(picture + "</svg>")
    space = "{http://www.w3.org/2000/svg}"
    assert root.findtext(f"{space}title") == "ranks by place and step" and root.attrib["role"] == "img"
    texts = [item.text for item in root.iter(f"{space}text")]
    assert texts[:4] == ["0", "1", "2", "3"], "the legend has every rank that occurs"
    assert "0" in texts[4:] and "1" in texts[4:] and "m.0.q.w" not in texts, "rows leave out what all names share"
    cells = [item for item in root.iter(f"{space}rect") if item.find(f"{space}title") is not None]
    assert [cell.findtext(f"{space}title") for cell in cells] == [
        "m.0.q.w, step 1: 1", "m.0.q.w, steps 3 to 11: 3", "m.1.q.w, steps 1 to 3: 1", "m.1.q.w, step 11: 2"
    ]  # fmt: skip
    widths = [float(cell.attrib["width"]) + 0.3 for cell in cells]
    assert [width / widths[0] for width in widths] == pytest.approx([1, 13 / 2, 10 / 2, 5 / 2], rel=0.01)
    shades = {cell.findtext(f"{space}title").rpartition(" ")[2]: cell.attrib["fill-opacity"] for cell in cells}
    swatches = [item.attrib["fill-opacity"] for item in root.iter(f"{space}rect")][:4]
    assert shades == {"1": swatches[1], "2": swatches[2], "3": swatches[3]}
    table = ElementTree.fromstring(rest).find("table")
    assert table is not None
    read = [["".join(cell.itertext()) for cell in row] for row in table.findall("tr")]
    assert read == [["place", "1", "3", "11"], ["m.0.q.w", "1", "3", "3"], ["m.1.q.w", "1", "1", "2"]]


def test_numbers_that_lie_close_together_are_told_apart() -> None:
    drawn = report.raster([(1, {"a": 0.50, "b": 0.52}), (2, {"a": 0.51, "b": 0.51})])
    assert 'fill-opacity="0.060"><title>a, step 1' in drawn and 'fill-opacity="1.000"><title>b, step 1' in drawn
    assert ">0.5</text>" in drawn and ">0.52</text>" in drawn


def test_a_long_record_keeps_its_first_and_its_last_moment() -> None:
    drawn = report.raster([(step, {"a": step}) for step in range(1000)])
    assert "step 0: 0<" in drawn and "step 999: 999<" in drawn and drawn.count("<rect") < 150


def test_what_rules_record_is_drawn_by_its_kind() -> None:
    history = {
        "number": [(1, 0.5), (2, 1)], "blocks": [(1, [0, 3]), (20, [1, 2])], "ranks": [(1, {"a": 3}), (2, {"a": 2})],
        "words": [(1, "<b>grown</b>")], "nothing": [],
    }  # fmt: skip
    drawn = "".join(report._histories(history))
    assert drawn.count("<svg") == 3
    assert "&lt;b&gt;grown" in drawn and "<b>grown" not in drawn and "nothing" not in drawn
