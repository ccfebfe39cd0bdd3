"""Evolution under a budget: the best of many configurations, of which each is a choice at every place."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Genome = tuple[str, ...]


@dataclass(frozen=True)
class Sizes:
    """How a search is laid out.

    Attributes:
        generations: number of rounds.
        population: candidates that a round scores, at most.
        keep: candidates that are parents of the next round.
        mutations, crossovers: how many of the population are tried to be made of parents; the rest is drawn.
        probability: of drawing a place anew in a mutation.
    """

    generations: int = 20
    population: int = 50
    keep: int = 10
    mutations: int = 25
    crossovers: int = 25
    probability: float = 0.2


def evolve(
    costs: Sequence[Mapping[str, int]], score: Callable[[Genome], float], budget: int, sizes: Sizes, seed: int
) -> tuple[Genome, list[float]]:
    """The best configuration found, and the best score after each generation.

    None is scored twice and none is over the budget: what is, is made cheaper at random places until it fits.

    Args:
        costs: for every place, what each choice costs; one of them nothing.
        score: of a configuration, larger is better.
        budget: largest sum of costs.
        sizes: of the search.
        seed: the same seed gives the same search.
    """
    draw = random.Random(seed)

    def fitting(genome: list[str]) -> Genome:
        while sum(cost[choice] for cost, choice in zip(costs, genome, strict=True)) > budget:
            place = draw.randrange(len(genome))
            cheaper = [choice for choice, cost in costs[place].items() if cost < costs[place][genome[place]]]
            genome[place] = draw.choice(cheaper) if cheaper else genome[place]
        return tuple(genome)

    def made(kind: str, parents: list[Genome]) -> list[str]:
        genome = [draw.choice(list(cost)) for cost in costs]
        if kind == "mutation":
            parent = draw.choice(parents)
            return [new if draw.random() < sizes.probability else p for new, p in zip(genome, parent, strict=True)]
        if kind == "crossover":
            pair = draw.choice(parents), draw.choice(parents)
            return [draw.choice(both) for both in zip(*pair, strict=True)]
        return genome

    scores: dict[Genome, float] = {}
    best: list[Genome] = []
    history = []
    for _ in range(sizes.generations):
        young: dict[Genome, None] = {}
        tries = [("mutation", sizes.mutations), ("crossover", sizes.crossovers)] if best else []
        for kind, number in [*tries, ("new", sizes.population)]:
            for _ in range(min(number, sizes.population - len(young))):
                genome = fitting(made(kind, best))
                if genome not in scores:
                    young[genome] = None
        for genome in young:
            scores[genome] = score(genome)
        best = sorted(scores, key=lambda genome: scores[genome], reverse=True)[: sizes.keep]
        history.append(scores[best[0]])
    return best[0], history
