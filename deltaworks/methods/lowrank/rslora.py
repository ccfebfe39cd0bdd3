"""rsLoRA: a rank stabilization scaling factor for fine-tuning with LoRA (Kalajdzievski 2023, arXiv:2312.03732).

W' = W + (alpha / sqrt(rank)) B A,  else as LoRA. Divided by the root, the branch and its gradients stay of one size as
the rank grows; divided by the rank, as in LoRA, large ranks learn ever more slowly.
The rate is that of `lora` at any rank, since the scale is there so that it need not change.
Use it instead of LoRA from a rank of about 32 on.
"""

from ...core import fields
from ...core.registry import method
from .lora import LoRA


@method("rslora", paper="2312.03732", family="lowrank")
class RsLoRA(LoRA):
    """LoRA whose scale falls with the root of its rank; trains `rank * (in + out)` values a layer."""

    rank: int = fields.positive(32, "inner dimension r")
    rslora: bool = fields.choice(True, (True,), "the method itself; `lora` has both scales")
