"""LoRA+: efficient low rank adaptation of large models (Hayou et al. 2024, arXiv:2402.12354).

W' = W + s B A,  as LoRA;  B learns `b_lr_ratio` times as fast as A, in any optimizer and under any schedule. For wide
layers this is the ratio under which both factors learn features. The paper takes half of LoRA's rate for A, no decay.
`peft` gives an embedding's factors a rate of their own (1e-6 there); here they follow the same rule.
Use it for LoRA's result in fewer steps; larger ratios for tasks that are further from pre-training.
"""

from ...core import fields
from ...core.registry import method
from .lora import LoRA


@method("lora_plus", paper="2402.12354", family="lowrank")
class LoRAPlus(LoRA):
    """LoRA with two learning rates; trains `rank * (in + out)` values a layer."""

    default_lr = 5e-4

    b_lr_ratio: float = fields.number(16.0, "learning rate of B over that of A; 4 to 32 are useful", above=0)
