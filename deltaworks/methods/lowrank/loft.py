"""LoFT: low-rank adaptation that behaves like full fine-tuning (Tastan et al. 2025, arXiv:2505.21289).

W' = W + B A, stepped as AdamW would step W itself, seen through the factors. With g_B = G_B (A A^T + damp I)^-1, the
first moment m_B of g_B and the second moment S_B of the outer products of its rows (`rank x rank` a row), both carried
over to every new A, the full moments are m_B A and diag(A^T S_B A); their Adam step U moves B by
-lr (U A^T) (A A^T + damp I)^-1.
A likewise; steps move B and A in turn, B first, and both keep their moments. Where the rank is full this is AdamW on W.
The released code carries S over with the transposed matrix, which departs from AdamW; here it is C^T S C, checked.
The rule makes the step: it takes learning rate and decay from the run's optimizer, which then has nothing left to do
for these tensors and keeps no state for them.
Use it where LoRA falls short of full fine-tuning at a very low rank; the state is `rank (rank + 1) (in + out)`.
"""

import torch
from torch import Tensor, nn

from ...core import fields
from ...core.init import kaiming, zeros
from ...core.method import WeightMethod
from ...core.operators.low_rank import LowRank
from ...core.registry import method
from ...core.rule import Rule, Run
from ...model.weights import Weight

ROWS = 1024  # rows of the full second moment that exist at a time


@method("loft", paper="2505.21289", family="lowrank")
class LoFT(WeightMethod):
    """LoRA at scale 1 under full fine-tuning's optimizer; trains `rank * (in + out)` values a layer."""

    default_lr = 2e-4
    everywhere = ("beta1", "beta2", "eps", "clip", "damp_a", "damp_b")

    rank: int = fields.positive(8, "inner dimension r")
    dropout: float = fields.fraction(0.0, "probability of dropping an input feature of the branch")
    beta1: float = fields.fraction(0.9, "smoothing of the gradient")
    beta2: float = fields.fraction(0.999, "smoothing of its square")
    eps: float = fields.number(1e-4, "added to the root of the second moment, as in the released code", low=0)
    clip: float = fields.number(1.0, "largest norm of the projected full gradient; 0 for any", low=0)
    damp_a: float = fields.number(1e-6, "added to B^T B before it is inverted", low=0)
    damp_b: float = fields.number(1e-8, "added to A A^T before it is inverted", low=0)

    def delta(self, weight: Weight) -> LowRank:
        return LowRank(kaiming(self.rank, weight.fan_in), zeros(weight.fan_out, self.rank), dropout=self.dropout)

    def rules(self) -> list[Rule]:
        return [FullAdam(self)]

    def count(self, weight: Weight) -> int:
        return self.rank * (weight.fan_in + weight.fan_out)


Side = tuple[Tensor, Tensor, Tensor, Tensor]
"""A factor as the L (`... n x r`) of a product L R, its gradient, R (`... r x m`), the root of R R^T + damp I."""


class FullAdam(Rule):
    """Steps one factor of every pair and keeps the moments of both.

    Attributes:
        moments: by factor's name: `m` (`n x r`), `s` (`n x r x r`), and the partner they were measured with.
        calls: how many steps were made.
    """

    memory = ("calls", "moments")

    def __init__(self, method: LoFT) -> None:
        self.method = method
        self.moments: dict[str, dict[str, Tensor]] = {}
        self.calls = 0

    @torch.no_grad()
    def gradients(self, run: Run) -> None:
        settings, moving = run.settings(), "ba"[self.calls % 2]
        held = run.tuned.tensors_of(LowRank, "a", "b")
        pairs = {name: pair for name, pair in held if pair[0].grad is not None and pair[1].grad is not None}
        every = {name: self.sides(*pair) for name, pair in pairs.items()}
        self.calls += 1
        share = self.clipping([sides[moving] for sides in every.values()])
        for name, (a, b) in pairs.items():
            for key, side in every[name].items():
                self._observe(f"{name}.{key}", side, share)
            side, group = every[name][moving], settings[id(b if moving == "b" else a)]
            step = self._step(self.moments[f"{name}.{moving}"], side)
            side[0].mul_(1 - group["lr"] * group.get("weight_decay", 0.0)).sub_(step * group["lr"])
            a.grad = b.grad = None  # the optimizer passes over what has no gradient

    def sides(self, a: nn.Parameter, b: nn.Parameter) -> dict[str, Side]:
        """Either factor as an L, by its name; A is its transpose."""
        assert a.grad is not None and b.grad is not None
        of_b = b, b.grad, a, root(a, self.method.damp_b)
        return {"b": of_b, "a": (a.mT, a.grad.mT, b.mT, root(b.mT, self.method.damp_a))}

    def clipping(self, sides: list[Side]) -> float:
        """The factor for all gradients: so that the projected full gradient of what moves is at most `clip` long."""
        if not self.method.clip or not sides:
            return 1.0
        total = 0.0
        for _, gradient, partner, lower in sides:
            g = over(gradient, lower)
            total += float(((g @ (partner @ partner.mT)) * g).sum())
        return min(1.0, self.method.clip / (max(total, 0.0) ** 0.5 + 1e-6))

    def _observe(self, name: str, side: Side, share: float) -> None:
        """Take a gradient into the moments of a factor, which are carried over to the partner as it is now."""
        (left, gradient, partner, lower), beta1, beta2 = side, self.method.beta1, self.method.beta2
        g, state = over(gradient * share, lower), self.moments.get(name)
        if state is None:
            m, s = torch.zeros_like(left), left.new_zeros(*left.shape, left.shape[-1])
        else:
            carry = over(state["partner"].to(partner) @ partner.mT, lower)
            m, s = state["m"].to(left) @ carry, twice(state["s"].to(left), carry)
        m = beta1 * m + (1 - beta1) * g
        s = s.mul_(beta2).addcmul_(g.unsqueeze(-1), g.unsqueeze(-2), value=1 - beta2)
        self.moments[name] = {"m": m, "s": s, "partner": partner.clone()}

    def _step(self, state: dict[str, Tensor], side: Side) -> Tensor:
        """What to move a factor by, times the learning rate."""
        (left, _, partner, lower), m, s = side, state["m"], state["s"]
        # S is symmetric: row by row, a^T S a is one product with the distinct products of a's entries.
        i, j = torch.triu_indices(*s.shape[-2:], device=s.device)
        squares = partner[..., i, :] * partner[..., j, :] * torch.where(i == j, 1.0, 2.0).to(partner).unsqueeze(-1)
        projected = torch.empty_like(left)
        for rows in torch.arange(left.shape[-2]).split(ROWS):
            chosen = slice(int(rows[0]), int(rows[-1]) + 1)
            second = (s[..., chosen, i, j] @ squares).clamp_(min=0).div_(1 - self.method.beta2**self.calls).sqrt_()
            update = (m[..., chosen, :] @ partner).div_(second.add_(self.method.eps))
            projected[..., chosen, :] = update @ partner.mT / (1 - self.method.beta1**self.calls)
        return over(projected, lower)


def twice(stack: Tensor, carry: Tensor) -> Tensor:
    """`C^T S C` for every symmetric S of a stack, `... n x r x r`, with C of `... r x r`: two products, not n."""
    for _ in range(2):
        stack = (stack.flatten(-3, -2) @ carry).view(stack.shape).mT.contiguous()
    return stack


def root(partner: Tensor, damp: float) -> Tensor:
    """The Cholesky factor of R R^T + damp I."""
    gram = partner @ partner.mT
    return torch.linalg.cholesky(gram + damp * torch.eye(gram.shape[-1]).to(gram))


def over(matrix: Tensor, lower: Tensor) -> Tensor:
    """`matrix (L L^T)^-1`, for `matrix` of `... n x r`."""
    return torch.cholesky_solve(matrix.mT, lower).mT
