"""Two processes, DDP and FSDP2, on the CPU give the loss curve and the adapter of one process."""

from __future__ import annotations

import multiprocessing
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from . import several
from .conftest import prepared_base, prepared_data

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.training.dying", "tests.training.several"])


def result_of(job: Any, world: int, folder: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    folder.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        (folder / "port").write_text(str(free.getsockname()[1]))
    group = [PROCESSES.Process(target=several.work, args=(job, rank, world, folder)) for rank in range(world)]
    for process in group:
        process.start()
    for process in group:
        process.join()
    assert [process.exitcode for process in group] == [0] * world
    return torch.load(folder / "result.pt", weights_only=True)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], dict[str, torch.Tensor]]:
    return result_of(several.single, 1, tmp_path_factory.mktemp("single") / "job")


@pytest.mark.parametrize("way", ["ddp", "fsdp", "trained", "trained_fsdp"])
def test_two_processes_are_one(way: str, tmp_path: Path, expected: Any) -> None:
    losses, tensors = result_of(getattr(several, way), 2, tmp_path / "job")
    assert losses == pytest.approx(expected[0], rel=1e-5)
    assert losses[-1] < losses[0]
    assert tensors.keys() == expected[1].keys()
    for name, value in tensors.items():
        torch.testing.assert_close(value, expected[1][name], rtol=1e-3, atol=1e-5)


def test_parameters_of_the_base_that_train_may_be_sharded(tmp_path: Path) -> None:
    losses, tensors = result_of(several.single_full, 1, tmp_path / "one")
    found, others = result_of(several.fsdp_full, 2, tmp_path / "two")
    assert found == pytest.approx(losses, rel=1e-5) and losses[-1] < losses[0]
    assert others.keys() == tensors.keys()
    for name, value in tensors.items():
        torch.testing.assert_close(others[name], value, rtol=1e-3, atol=1e-4)


def test_rules_decide_alike_in_all_processes(tmp_path: Path) -> None:
    losses, tensors = result_of(several.single_adalora, 1, tmp_path / "one")
    found, others = result_of(several.ddp_adalora, 2, tmp_path / "two")
    assert found == pytest.approx(losses, rel=1e-5)
    assert {name: value.shape for name, value in others.items()} == {name: v.shape for name, v in tensors.items()}
    assert len({value.shape for name, value in tensors.items() if "q_proj" in name and name.endswith(".l")}) >= 1


def test_a_recipe_run_by_two_processes_is_that_of_one(tmp_path: Path) -> None:
    prepared_base(tmp_path, "llama")
    prepared_data(tmp_path, "completions")
    losses, tensors = result_of(several.tuned_run, 1, tmp_path / "one")
    found, others = result_of(several.tuned_run, 2, tmp_path / "two")
    assert found == pytest.approx(losses, rel=1e-4)
    for name, value in tensors.items():
        torch.testing.assert_close(others[name], value, rtol=1e-3, atol=1e-5)
    assert (tmp_path / "two" / "out" / "metrics.json").is_file()


def test_the_trainer_alone_is_the_plain_loop(tmp_path: Path, expected: Any) -> None:
    losses, _ = result_of(several.trained, 1, tmp_path / "job")
    assert losses == pytest.approx(expected[0], rel=1e-5)
