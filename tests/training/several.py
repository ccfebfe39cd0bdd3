"""What each of two processes does in the distributed tests; imported by processes, so not a test module."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

import deltaworks as dw
from deltaworks.training import Recipe, checkpoint, tune, wrap
from tests.families import FAMILIES

STEPS, ROWS = 6, torch.randint(5, 64, (8, 12), generator=torch.Generator().manual_seed(0)).repeat(3, 1)


def adapted(slug: str = "lora", **settings: Any) -> tuple[nn.Module, dw.Tuned]:
    model, _ = FAMILIES["llama"]()
    return model, dw.attach(model, dw.method(slug, **(settings or {"rank": 2})), seed=0)


def loop(wrapped: nn.Module, tuned: dw.Tuned, rank: int, world: int) -> tuple[list[float], dict[str, Tensor]]:
    """A plain loop: the loss of every step over all processes, and the tensors at the end."""
    optimizer = torch.optim.AdamW(tuned.parameter_groups(1e-2, weight_decay=0.1))
    rules = tuned.run(STEPS, optimizer=optimizer)
    rules.emit("attached")
    losses = []
    for step in range(STEPS):
        rules.emit("step_begin")
        rows = ROWS[4 * step : 4 * step + 4].chunk(world)[rank]
        loss = wrapped(input_ids=rows, labels=rows).loss
        penalty = rules.penalty()
        (loss if penalty is None else loss + penalty).backward()
        rules.emit("gradients")
        optimizer.step()
        rules.emit("step_end")
        optimizer.zero_grad()
        total = loss.detach().clone()
        if world > 1:
            dist.all_reduce(total)
        losses.append(total.item() / world)
    rules.emit("finished")
    return losses, {name: checkpoint.whole(value.detach()).clone() for name, value in tuned.tensors().items()}


def single(rank: int, world: int, folder: Path) -> Any:
    model, tuned = adapted()
    return loop(model, tuned, 0, 1)


def ddp(rank: int, world: int, folder: Path) -> Any:
    model, tuned = adapted()
    return loop(DistributedDataParallel(model), tuned, rank, world)


def single_adalora(rank: int, world: int, folder: Path) -> Any:
    model, tuned = adapted("adalora", init_rank=3, target_rank=2)
    return loop(model, tuned, 0, 1)


def ddp_adalora(rank: int, world: int, folder: Path) -> Any:
    model, tuned = adapted("adalora", init_rank=3, target_rank=2)
    return loop(DistributedDataParallel(model), tuned, rank, world)


def fsdp(rank: int, world: int, folder: Path) -> Any:
    model, tuned = adapted()
    for block in model.model.layers:  # type: ignore[union-attr]
        fully_shard(block)
    fully_shard(model)
    result = loop(model, tuned, rank, world)
    assert all(parameter.to_local().numel() < parameter.numel() for parameter in model.model.layers[0].parameters())  # type: ignore[union-attr, operator]
    assert not [name for name in model.state_dict() if ".deltaworks." not in name and name not in base_names()]
    return result


def single_full(rank: int, world: int, folder: Path) -> Any:
    model, tuned = adapted("full", on=["attention", "mlp.down"])
    return loop(model, tuned, 0, 1)


def fsdp_full(rank: int, world: int, folder: Path) -> Any:
    """Parameters of the base that train and are sharded: trained, switched off and on, saved, and given back."""
    plain, _ = FAMILIES["llama"]()
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    model, tuned = adapted("full", on=["attention", "mlp.down"])
    for block in model.model.layers:  # type: ignore[union-attr]
        fully_shard(block)
    fully_shard(model)
    result = loop(model, tuned, rank, world)

    def logits(of: nn.Module) -> Tensor:
        with torch.no_grad():
            found = of(input_ids=ROWS[:2]).logits
        for module in of.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        return found

    trained = logits(model)
    with dw.disable(model):
        assert torch.equal(logits(model), logits(plain)) and not torch.equal(trained, logits(plain))
    assert torch.equal(logits(model), trained)
    dw.save(model, folder / "artifact")
    if rank == 0:
        fresh, _ = FAMILIES["llama"]()
        dw.load(fresh, folder / "artifact")
        assert torch.equal(logits(fresh), trained)
    dw.detach(model)
    after = {name: checkpoint.whole(value.detach()) for name, value in model.state_dict().items()}
    assert after.keys() == before.keys() and all(torch.equal(value, before[name]) for name, value in after.items())
    return result


def base_names() -> list[str]:
    return list(FAMILIES["llama"]()[0].state_dict())


def trained(rank: int, world: int, folder: Path, fully: bool = False) -> Any:
    """The same run by the Trainer, killed half-way and resumed when there are several processes."""
    sharding: dict[str, Any] = {}
    if fully:
        layers = {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
        sharding = {"fsdp": True, "fsdp_config": {"fsdp_version": 2, **layers}}

    def trainer() -> Any:
        model, _ = adapted()
        args = TrainingArguments(
            str(folder / "trainer"), max_steps=STEPS, per_device_train_batch_size=4 // world, learning_rate=1e-2,
            lr_scheduler_type="constant", weight_decay=0.1, logging_steps=1, save_steps=3, max_grad_norm=0,
            report_to=[], use_cpu=True, disable_tqdm=True, train_sampling_strategy="sequential", **sharding,
        )  # fmt: skip
        made = wrap(Trainer)(model, args, train_dataset=[{"input_ids": row, "labels": row} for row in ROWS])
        made.log = lambda logs, *_: made.state.log_history.append({**logs, "step": made.state.global_step})
        return made

    made = trainer()
    made.train()
    first = {name: checkpoint.whole(value.detach()).clone() for name, value in made.tuned.tensors().items()}
    if world > 1:
        made = trainer()
        made.train(resume_from_checkpoint=str(folder / "trainer" / "checkpoint-3"))
        again = {name: checkpoint.whole(value.detach()) for name, value in made.tuned.tensors().items()}
        assert all(torch.equal(value, first[name]) for name, value in again.items()), "resuming changed the result"
    made.save_model(str(folder / "artifact"))
    if rank == 0:
        model, _ = FAMILIES["llama"]()
        stored = dw.load(model, folder / "artifact").tensors()
        assert all(torch.equal(value, first[name]) for name, value in stored.items()), "the artifact differs"
    return [entry["loss"] for entry in made.state.log_history if "loss" in entry], first


def trained_fsdp(rank: int, world: int, folder: Path) -> Any:
    return trained(rank, world, folder, fully=True)


def tuned_run(rank: int, world: int, folder: Path) -> Any:
    """A recipe, run by `tune`."""
    from tests.training.conftest import prepared_base, prepared_data

    recipe = {"steps": 5, "batch_size": 4 // world, "lr": 1e-2, "device": "cpu", "samples": 0, "save_every": 2}
    places = {"base": prepared_base(folder.parent, "llama"), "data": prepared_data(folder.parent, "completions")}
    result = tune(Recipe.of(recipe, places, {"output": str(folder / "out")}))
    assert result.tuned is not None
    losses = [loss for _, loss in result.metrics["losses"]]
    return losses, {name: value.detach().clone() for name, value in result.tuned.tensors().items()}


def work(job: Callable[..., Any], rank: int, world: int, folder: Path) -> None:
    """Join the group, do the job, write what came out."""
    torch.set_num_threads(1)
    given = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1"}
    given["MASTER_PORT"] = (folder / "port").read_text()
    if world > 1:
        os.environ |= {name: str(value) for name, value in given.items()} | {"ACCELERATE_USE_CPU": "true"}
        if job is not tuned_run:
            dist.init_process_group("gloo")
    result = job(rank, world, folder)
    if rank == 0:
        torch.save(result, folder / "result.pt")
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
