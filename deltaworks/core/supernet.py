"""Parts that hold several configurations at once: the best within a budget is found, and the rest dropped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .evolution import Genome, Sizes, evolve
from .operators.general import Terms
from .tuned import Tuned


@dataclass(frozen=True)
class Found:
    """The outcome of a search.

    Attributes:
        kinds: of every part, by name.
        score: of the configuration.
        parameters: that it trains.
        history: the best score after each generation.
    """

    kinds: dict[str, dict[str, str]]
    score: float
    parameters: int
    history: list[float]


def search(
    tuned: Tuned,
    score: Callable[[], float],
    *,
    budget: int = 1_000_000,
    sizes: Sizes | None = None,
    seed: int = 0,
    settle: bool = True,
) -> Found:
    """Find every layer's configuration by evolution, and leave the adapter in it.

    Args:
        tuned: an adapter whose parts were trained in all their configurations (`glora` with `supernet=True`).
        score: a number for the model as it is set at the time, such as accuracy on held-out data; larger is better.
        budget: largest number of parameters of a configuration.
        sizes: of the search; none for the paper's.
        seed: the same seed gives the same search.
        settle: drop the tensors that the result does not use; else the supernet stays, set to the result.

    Raises:
        ValueError: when the adapter has no supernet.
    """
    parts = {name: part for name, part in tuned.named_parts() if isinstance(part, Terms) and part.searching}
    if not parts:
        raise ValueError(f"{tuned.name} has no supernet to search; attach glora with supernet=True and train it")
    genes = [(name, term) for name, part in parts.items() for term in part.choices]
    costs = [{kind: _cost(parts[name], term, kind) for kind in parts[name].choices[term]} for name, term in genes]

    def configure(genome: Genome) -> None:
        for name, part in parts.items():
            part.configure({term: kind for (owner, term), kind in zip(genes, genome, strict=True) if owner == name})

    def scored(genome: Genome) -> float:
        configure(genome)
        return float(score())

    before = {name: (part.kinds, part.fixed) for name, part in parts.items()}
    modes = {module: module.training for module in tuned.model.modules()}
    tuned.model.eval()
    try:
        best, history = evolve(costs, scored, budget, sizes or Sizes(), seed)
    except BaseException:
        for name, part in parts.items():
            part.kinds, part.fixed = before[name]
        raise
    finally:
        for module, mode in modes.items():
            module.training = mode
    configure(best)
    kinds = {name: dict(part.kinds) for name, part in parts.items()}
    if settle:
        for name, part in parts.items():
            tuned.exchange(name, part.settled())
    return Found(kinds, history[-1], sum(cost[kind] for cost, kind in zip(costs, best, strict=True)), history)


def _cost(part: Terms, term: str, kind: str) -> int:
    """How many values a term of a kind trains."""
    down, up = getattr(part, f"{term}d"), getattr(part, f"{term}u", None)
    if down is None:
        return 0
    lora = down.numel() + up.numel() if up is not None else 0
    return {"lora": lora, "vector": down.shape[0], "constant": 1, "none": 0}[kind]
