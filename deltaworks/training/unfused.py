"""TRL's fused head, for models whose head or whole call an adapter changes.

TRL's trainers take log-probabilities from the backbone's hidden states and the head's weight, and never call head or
model. Where a change acts on these calls, the logits have to be made after all; this gives TRL the same figures.
"""

from __future__ import annotations

import functools
import types
from typing import Any

from torch import Tensor, nn

from ..core.part import Delta, Trained
from ..core.tuned import Tuned

IGNORED = -100


def is_fused(model: nn.Module) -> bool:
    """Whether TRL has given the model its fused head."""
    code = getattr(model.forward, "__code__", None)
    return code is not None and code.co_name == "_fused_forward"


def acts_outside(tuned: Tuned) -> bool:
    """Whether an adapter changes what the head or the whole model returns, beyond a value of the head's weight."""
    model: Any = tuned.model
    head = model.get_output_embeddings()
    for part in tuned.parts():
        place = model.get_submodule(part.site.path)
        if not isinstance(part, Trained) and (place is head or (place is model and not isinstance(part, Delta))):
            return True
    return False


def unfuse(model: nn.Module, temperature: float = 1.0) -> None:
    """Let `model(..., fused_lm_head=True)` give what TRL's fused head gives, from the model's own logits.

    Args:
        model: one that `is_fused`.
        temperature: that TRL divides logits by.
    """
    plain = type(model).forward

    @functools.wraps(plain)
    def forward(
        self: Any, *args: Any, fused_lm_head: bool = False, labels: Tensor | None = None,
        shift_labels: Tensor | None = None, num_items_in_batch: Any = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        if not fused_lm_head:
            named = {"labels": labels, "shift_labels": shift_labels, "num_items_in_batch": num_items_in_batch}
            return plain(self, *args, **{key: value for key, value in named.items() if value is not None}, **kwargs)
        outputs = plain(self, *args, **kwargs)
        logits = outputs.logits
        if shift_labels is None:
            assert labels is not None
            logits, wanted = logits[:, :-1], labels[:, 1:]
        else:
            wanted = shift_labels
        aux = getattr(outputs, "aux_loss", None)
        weight = getattr(self.config.get_text_config(), "router_aux_loss_coef", 0.0)
        return _figures(logits.float() / temperature, wanted.to(logits.device), num_items_in_batch, aux, weight)

    model.forward = types.MethodType(forward, model)


def _figures(logits: Tensor, wanted: Tensor, items: Any, aux: Tensor | None, weight: float) -> Any:
    """Per-token figures of logits (`batch x length x vocabulary`), zero where nothing is wanted."""
    from trl.trainer.utils import FusedCausalLMOutput

    mask = wanted != IGNORED
    logs = logits.log_softmax(-1)
    chosen = logs.gather(-1, wanted.clamp(min=0).unsqueeze(-1)).squeeze(-1).masked_fill(~mask, 0)
    loss = -chosen.sum() / (mask.sum().clamp(min=1) if items is None else items)
    fixed = logs.detach()
    return FusedCausalLMOutput(
        loss=loss if aux is None else loss + weight * aux,  # type: ignore[arg-type]
        log_probs=chosen,  # type: ignore[arg-type]
        entropy=-(logs.exp() * logs).sum(-1).masked_fill(~mask, 0),  # type: ignore[arg-type]
        log_sum_sq_probs=(2 * fixed).logsumexp(-1).masked_fill(~mask, 0),  # type: ignore[arg-type]
        mean_logits=logits.detach().mean(-1).masked_fill(~mask, 0),  # type: ignore[arg-type]
        is_top1=((fixed.argmax(-1) == wanted) & mask),  # type: ignore[arg-type]
        label_mask=mask,  # type: ignore[arg-type]
        aux_loss=aux,  # type: ignore[arg-type]
    )
