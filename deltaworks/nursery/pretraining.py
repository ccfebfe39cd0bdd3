"""What the pre-training of every base shares: optimizers, schedule and the measure of the result."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional


class Optimizers:
    """Muon for the blocks' matrices, AdamW for the rest, under one learning-rate schedule.

    Muon (Jordan et al. 2024; update scale of Liu et al. 2025, arXiv:2502.16982) orthogonalises the matrices' momentum,
    and reaches a given loss in clearly fewer steps than AdamW alone. The schedule warms up over the first 3 % of the
    run, holds, and falls linearly to zero over the last `decay` of it.
    """

    def __init__(self, model: nn.Module, rate: float, decay: float = 0.4) -> None:
        self.rate, self.decay = rate, decay
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        inside = {
            id(module.weight)
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and any(part.isdigit() for part in name.split("."))
        }
        matrices = [parameter for parameter in self.parameters if id(parameter) in inside]
        others = [parameter for parameter in self.parameters if id(parameter) not in inside]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
        ]
        if matrices:
            muon = torch.optim.Muon(matrices, lr=rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
            self.optimizers.append(muon)

    def step(self, progress: float) -> None:
        """One update with the rate that is due when `progress` (0 to 1) of the run is behind."""
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        factor = min(1.0, (progress + 1e-3) / 0.03, max(0.0, 1 - progress) / self.decay)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.rate * factor
            optimizer.step()
            optimizer.zero_grad()


def windows(stream: Tensor, length: int, generator: torch.Generator) -> Tensor:
    """Cut a token stream into shuffled rows of `length` tokens, beginning at a random offset.

    `stream` is `[tokens]`, the result `[rows, length]`.
    """
    offset = int(torch.randint(length, (1,), generator=generator))
    rows = stream[offset : offset + (len(stream) - offset) // length * length].view(-1, length)
    return rows[torch.randperm(len(rows), generator=generator)]


@torch.no_grad()
def bits_per_byte(model: nn.Module, token_ids: Iterable[Sequence[int]], size: int, context: int = 512) -> float:
    """Held-out bits per byte of a causal model: every token's surprise, over the bytes of the text.

    `token_ids` are whole documents, each with its first token as context only; `size` is the documents' length in
    bytes (UTF-8). A document longer than `context` is cut into windows that do not overlap, so most tokens see less
    than the whole context: the figure is an upper bound.
    """
    nats = 0.0
    device = next(model.parameters()).device
    for ids in token_ids:
        document = torch.tensor(ids, device=device)
        for start in range(0, len(document) - 1, context):
            window = document[start : start + context + 1]
            logits = model(input_ids=window[None, :-1]).logits[0].float()
            nats += float(functional.cross_entropy(logits, window[1:], reduction="sum"))
    return nats / math.log(2) / size


def unigram_bits(token_ids: Iterable[Sequence[int]], vocabulary: int) -> float:
    """Entropy of the tokens' own frequencies, in nats per token: what is reached without looking at any context."""
    counts = torch.bincount(torch.tensor([token for ids in token_ids for token in ids]), minlength=vocabulary)
    probabilities = counts[counts > 0] / counts.sum()
    return float(-(probabilities * probabilities.log()).sum())
