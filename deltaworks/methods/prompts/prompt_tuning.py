"""Prompt tuning: the power of scale for parameter-efficient prompt tuning (Lester et al. 2021, arXiv:2104.08691).

The model reads [P; E(x)], P: length x width, all else frozen; of an encoder-decoder only the encoder does. Rows enter
at the output of the embedding module, so that whatever a model does to its embeddings there has been done.
Losses and heads see the text's rows only: nothing is predicted at the prompt, and classifiers read the text's first or
last token. PEFT's classifiers on encoders read the prompt's first row instead (`readout="prompt"`).
Use it for many tasks on one large frozen base; below some billions of parameters prefer anything that goes deeper.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...core import fields
from ...core.init import uniform
from ...core.method import Method, Placed
from ...core.operators.soft_prompt import PromptedEncoder, SoftPrompt, TextRows, entrance
from ...core.part import Shared
from ...core.registry import method
from ...model.anatomy import Anatomy, Site

FREQUENT = 5000


@method("prompt_tuning", paper="2104.08691", family="prompts")
class PromptTuning(Method):
    """A soft prompt; trains `length * width` values."""

    overridable = False
    mergeable = False
    exact_at_start = False
    default_lr = 0.3
    refuses = ("vit",)

    length: int = fields.positive(20, "m, rows in front of the text; the paper takes 100 below 11B")
    init: str = fields.choice(
        "vocabulary",
        ("uniform", "vocabulary", "text", "labels"),
        "start: U(-0.5, 0.5), rows of random frequent tokens, of init_ids, or of the class labels in init_ids (best)",
    )
    init_ids: list[Any] = fields.token_ids(
        "text: token ids, repeated or cut to m; labels: the token ids of each label, a row for each, then again"
    )
    readout: str = fields.choice(
        "text", ("text", "prompt"), "whose first row classifiers on encoders read; prompt as with HF PEFT"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.init in ("text", "labels")) != bool(self.init_ids):
            raise ValueError("prompt_tuning: init='text' and init='labels' take init_ids, the others do not")

    def parts(self, base: Anatomy, shared: dict[str, Shared], measured: Any) -> Iterator[Placed]:
        path, stack = entrance(base, self.slug)
        backbone = base.model.get_submodule(path)
        inner = base.is_encoder_decoder
        if self.readout == "prompt" and (inner or stack.causal):
            raise ValueError(
                f"prompt_tuning: readout='prompt' is for encoders, which {type(base.model).__name__} is not"
            )
        prompt = self._start(backbone.get_input_embeddings())  # type: ignore[operator]
        first = self.readout == "prompt"
        site = Site(path, role=None, kind="other", parameter=None)
        yield Placed(site, SoftPrompt(prompt, stack.causal, inner, first), "prompt")
        if inner:
            yield Placed(Site("", role=None, kind="other", parameter=None), PromptedEncoder(self.length), "prompted")
        pooler = getattr(backbone, "pooler", None)
        if isinstance(pooler, nn.Module) and not first:
            if isinstance(pooler, nn.Linear):
                raise ValueError(
                    f"prompt_tuning: {type(base.model).__name__} pools the first of all rows, which is the prompt's; "
                    "take readout='prompt' if that is meant"
                )
            at = Site(f"{path}.pooler".lstrip("."), role="pooler", kind="other", parameter=None)
            yield Placed(at, TextRows(self.length), "text")

    @torch.no_grad()
    def _start(self, embedding: nn.Module) -> Tensor:
        """The first rows, `length x width`."""
        weight: Any = embedding.weight
        vocabulary, width = weight.shape

        def embedded(ids: Tensor) -> Tensor:
            return embedding(ids.to(weight.device)).float()

        if self.init == "uniform":
            return uniform(self.length, width, bound=0.5)
        if self.init == "vocabulary":
            return embedded(torch.randint(min(FREQUENT, vocabulary), (self.length,)))
        labels = [item if isinstance(item, (list, tuple)) else [item] for item in self.init_ids]
        if self.init == "text" and any(len(label) > 1 for label in labels):
            raise ValueError("prompt_tuning: init='text' takes one list of token ids; several are for 'labels'")
        if max(max(label) for label in labels) >= vocabulary:
            raise ValueError(f"prompt_tuning: init_ids has ids beyond the base's vocabulary of {vocabulary}")
        rows = torch.stack([embedded(torch.tensor(label)).mean(0) for label in labels])
        return rows[torch.arange(self.length) % len(rows)]
