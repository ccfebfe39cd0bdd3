"""Second moments of what layers read: `C = (1/n) sum_t x_t x_t^T` over tokens, without keeping a single activation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..model.anatomy import Anatomy, describe
from .running import Batch, moved, untouched


class SecondMoment:
    """The running second moment of vectors.

    Attributes:
        width: length of a vector.
        count: how many were seen.
        sum: their sum, `width`.
        products: the sum of `x x^T` (`width x width`), or of `x^2` (`width`) when `diagonal`.
    """

    def __init__(self, width: int, *, diagonal: bool = False, device: torch.device | str = "cpu") -> None:
        self.width, self.diagonal, self.count = width, diagonal, 0
        self.sum = torch.zeros(width, dtype=torch.float64, device=device)
        shape = (width,) if diagonal else (width, width)
        self.products = torch.zeros(shape, dtype=torch.float64, device=device)

    def update(self, x: Tensor) -> None:
        """Take in vectors, `... x width`."""
        flat = x.detach().reshape(-1, self.width).to(torch.promote_types(x.dtype, torch.float32))
        self.count += len(flat)
        self.sum += flat.sum(0).to(self.sum)
        self.products += (flat.square().sum(0) if self.diagonal else flat.T @ flat).to(self.products)

    def merge(self, other: SecondMoment) -> None:
        """Take in what another one has seen."""
        if (other.width, other.diagonal) != (self.width, self.diagonal):
            raise ValueError(f"moments of width {self.width} and {other.width} cannot be merged")
        self.count += other.count
        self.sum += other.sum.to(self.sum)
        self.products += other.products.to(self.products)

    @property
    def mean(self) -> Tensor:
        """The mean vector, `width`, float64."""
        return self.sum / max(self.count, 1)

    @property
    def uncentred(self) -> Tensor:
        """The mean of `x x^T` (of `x^2` when diagonal), float64."""
        return self.products / max(self.count, 1)

    @property
    def covariance(self) -> Tensor:
        """The mean of `(x - mean)(x - mean)^T` (its diagonal when diagonal), float64."""
        mean = self.mean
        return self.uncentred - (mean.square() if self.diagonal else torch.outer(mean, mean))

    def principal(self, k: int, *, centred: bool = False) -> tuple[Tensor, Tensor]:
        """The `k` largest eigenvalues, descending, and their unit eigenvectors as columns (`width x k`)."""
        if self.diagonal:
            raise ValueError("a diagonal moment has no principal directions; measure the full one")
        values, vectors = torch.linalg.eigh(self.covariance if centred else self.uncentred)
        return values.flip(0)[:k], vectors.flip(1)[:, :k]


def second_moments(
    model: nn.Module,
    paths: Sequence[str],
    batches: Iterable[Batch],
    *,
    outputs: bool = False,
    diagonal: bool = False,
    per_pass: int | None = None,
    answers: bool = False,
) -> Iterator[tuple[str, SecondMoment]]:
    """The second moment of what each module reads (or gives), over all tokens that an attention mask does not hide.

    Args:
        model: run in evaluation mode and left as it was.
        paths: modules by dotted name; of a tuple the first tensor counts.
        batches: as the model is called. Gone through once for every group of modules.
        outputs: measure outputs instead of inputs.
        diagonal: keep mean squares only.
        per_pass: how many modules are measured at a time; None for all in one pass. With 1, memory is that of one
            module's moment, and time as many passes.
        answers: count only tokens with a label (not -100). Of a model that reads one text and writes another these
            are the written ones, of which those without a label are padding and never count.

    Yields:
        path and moment, group by group; a caller that drops each keeps no more than one group.

    Raises:
        ValueError: when a module is never called with a tensor, or there is no batch.
    """
    size = per_pass or max(len(paths), 1)
    if size < len(paths):
        batches = list(batches)
    for start in range(0, len(paths), size):
        yield from _one_pass(model, paths[start : start + size], batches, outputs, diagonal, answers).items()


def _one_pass(
    model: nn.Module, paths: Sequence[str], batches: Iterable[Batch], outputs: bool, diagonal: bool, answers: bool
) -> dict[str, SecondMoment]:
    moments: dict[str, SecondMoment] = {}
    base = describe(model)
    writing = {path: base.is_encoder_decoder and _writes(base, path) for path in paths}
    visible: dict[bool, Tensor | None] = {}

    def take(path: str, values: Any) -> None:
        x = _first(values)
        if x is None:
            return
        if path not in moments:
            moments[path] = SecondMoment(x.shape[-1], diagonal=diagonal, device=x.device)
        mask = visible[writing[path]]
        moments[path].update(x if mask is None or mask.shape != x.shape[:-1] else x[mask.to(x.device)])

    handles = []
    try:
        for path in paths:
            module = model.get_submodule(path)
            if outputs:
                hook = module.register_forward_hook(lambda m, a, k, y, path=path: take(path, y), with_kwargs=True)
            else:
                hook = module.register_forward_pre_hook(
                    lambda m, a, k, path=path: take(path, (*a, *k.values())), with_kwargs=True
                )
            handles.append(hook)
        with untouched(model), torch.no_grad():
            for batch in batches:
                labelled = batch["labels"] != -100 if isinstance(batch.get("labels"), Tensor) else None
                visible = {False: _mask(batch, "attention_mask"), True: _mask(batch, "decoder_attention_mask")}
                if base.is_encoder_decoder:
                    # Where labels are no text the decoder reads again what the encoder read.
                    text = labelled if labelled is not None and labelled.dim() == 2 else None
                    written = _both(visible[True], text)
                    visible[True] = visible[False] if written is None else written
                elif answers:
                    visible[False] = _both(visible[False], labelled)
                model(**moved(batch, model))
    finally:
        for handle in handles:
            handle.remove()
    missing = [path for path in paths if path not in moments]
    if missing:
        raise ValueError(f"{', '.join(missing)} read no activations: no batch was given, or the module is never called")
    return {path: moments[path] for path in paths}


def _mask(batch: Batch, name: str) -> Tensor | None:
    found = batch.get(name)
    return found.bool() if isinstance(found, Tensor) else None


def _both(mask: Tensor | None, other: Tensor | None) -> Tensor | None:
    return other if mask is None else mask if other is None else mask & other.to(mask.device)


def _writes(base: Anatomy, path: str) -> bool:
    """Whether a module of an encoder-decoder sees the tokens that are written, not those that are read."""
    if path == base.head:
        return True
    if any((site.role or "") in ("cross_attention.key", "cross_attention.value", "cross_attention.kv")
           for site in base.by_path.get(path, [])):  # fmt: skip
        return False
    blocks = (block for block in base.blocks if path.startswith(f"{block.path}."))
    return any(block.stack == "decoder" for block in blocks) or any(
        stack.name == "decoder" and path == stack.final_norm for stack in base.stacks
    )


def _first(values: Any) -> Tensor | None:
    for value in values if isinstance(values, (tuple, list)) else (values,):
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 1:
            return value
    return None
