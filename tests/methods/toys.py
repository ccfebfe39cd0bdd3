"""Small networks for the tests of the method pages: float64, so that equalities are sharp."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

import deltaworks as dw
from deltaworks.core.method import Method
from deltaworks.core.part import Part


class Net(nn.Module):
    """Linear layers `first` (`hidden x in`) and `second` (`out x hidden`) with a tanh between."""

    def __init__(self, fan_in: int = 12, hidden: int = 8, fan_out: int = 6) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(fan_in, hidden), nn.Linear(hidden, fan_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def net(*sizes: int, seed: int = 0) -> tuple[Net, Tensor]:
    """A network and an input of 2 x 5 rows."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Net(*sizes).double()
        return model, torch.randn(2, 5, model.first.in_features, dtype=torch.float64)


def attach(model: nn.Module, method: Callable[..., Method], seed: int = 0, **settings) -> dw.Tuned:
    """Attach to every linear layer."""
    return dw.attach(model, method(**({"on": nn.Linear} | settings)), seed=seed)


@torch.no_grad()
def nudge(tuned: dw.Tuned, size: float = 0.1, seed: int = 1) -> None:
    """Move every trained tensor off its start."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in tuned.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter), alpha=size)


def part(tuned: dw.Tuned, path: str = "first") -> Part:
    """The part at one layer."""
    return next(part for name, part in tuned.named_parts() if name.startswith(path))


def steps(
    model: nn.Module, x: Tensor, tuned: dw.Tuned, count: int, lr: float = 0.05, decay: float = 0.0
) -> Iterator[int]:
    """Train towards a fixed random target by AdamW; yields after every step, rules included."""
    generator = torch.Generator().manual_seed(7)
    target = torch.randn(model(x).shape, generator=generator, dtype=x.dtype)
    optimizer = torch.optim.AdamW(tuned.parameter_groups(lr, weight_decay=decay))
    rules = tuned.run(count, optimizer=optimizer)
    rules.emit("attached")
    for step in range(1, count + 1):
        optimizer.zero_grad()
        rules.emit("step_begin")
        loss = (model(x) - target).square().mean()
        penalty = rules.penalty()
        (loss if penalty is None else loss + penalty).backward()
        rules.emit("gradients")
        optimizer.step()
        rules.emit("step_end")
        yield step
    rules.emit("finished")


def assert_stored_and_merged(model: nn.Module, fresh: nn.Module, x: Tensor, folder: Path) -> None:
    """The output comes back bit for bit from a file on a fresh base, and closely from merged weights."""
    expected = model(x)
    dw.save(model, folder / "adapter")
    dw.load(fresh, folder / "adapter")
    assert torch.equal(fresh(x), expected)
    dw.merge(model)
    assert torch.allclose(model(x), expected)


def saved_shapes(call: Callable[[], Tensor]) -> list[tuple[int, ...]]:
    """Shapes of what autograd keeps for backward while `call` runs, parameters and views of them left out."""
    kept: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter) and not isinstance(tensor._base, nn.Parameter):
            kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return kept
