"""HF PEFT's format, read and written without PEFT.

Each module is one `peft_type`: `KIND`, `read(source)`, `fits(part)`, `write(draft)`, and `METHOD` where only one method
is written so. What one side cannot express is refused with the option's name; what acts in training only is left out of
what is read, with a warning.

| `peft_type` | read as | written for |
|---|---|---|
| `LORA` | `lora`, `dora`, `pissa`, `olora` | any product of two factors, of rank 2r where a start is subtracted |
| `ADALORA` | `adalora` | `adalora`, ranks that fell as masks |
| `VERA`, `VBLORA`, `RANDLORA` | `vera`, `vb_lora`, `randlora` | the same; frozen matrices by their seed |
| `FOURIERFT`, `C3A` | `fourierft`, `c3a` | the same |
| `OFT`, `BOFT`, `HRA` | `oft`, `boft`, `hra` | the same |
| `LOHA`, `LOKR` | `loha`, `lokr` | the same, and Kronecker products that PEFT splits alike |
| `MISS` | `miss`, `bone_bat` | the same |
| `GLORA` | `glora` | `glora` without a search |
| `IA3`, `LN_TUNING` | `ia3`, `layernorm` | the same |
| `PROMPT_TUNING`, `PREFIX_TUNING` | `prompt_tuning`, `prefix_tuning` | the same |
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from ...core.tuned import Tuned
from ..files import PEFT_CONFIG, refuse
from ..reading import Plan
from . import (
    adalora,
    boft,
    c3a,
    fourierft,
    glora,
    hra,
    ia3,
    layernorm,
    loha,
    lokr,
    lora,
    miss,
    oft,
    prefixes,
    prompts,
    randlora,
    vblora,
    vera,
)
from .draft import Draft
from .source import Source

MODULES = (
    *(ia3, vera, vblora, randlora, fourierft, c3a, oft, boft, hra, loha, lokr, miss, glora, adalora, lora),
    *(layernorm, prompts, prefixes),
)
KINDS: dict[str, ModuleType] = {module.KIND: module for module in MODULES}


def read(model: nn.Module, folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Plan:
    """The adapter a PEFT folder holds, verified against a model that is only looked at.

    Raises:
        ValueError: naming the file and the option or tensor that is wrong or cannot be expressed.
    """
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in KINDS:
        refuse(folder / PEFT_CONFIG, f"peft_type={kind!r} cannot be read; known are {', '.join(KINDS)}")
    return KINDS[kind].read(Source(model, folder, config, tensors))


def write(handle: Tuned) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """An adapter as PEFT's configuration and tensors.

    Raises:
        ValueError: naming the part or hyper-parameter that PEFT's format has no words for.
    """
    draft = Draft(handle)
    if not draft.parts:
        return layernorm.write(draft), draft.tensors
    # Types that write down a method's own hyper-parameters are for that method; its parts elsewhere may be factors.
    writers = [module for module in MODULES if getattr(module, "METHOD", draft.method.slug) == draft.method.slug]
    for module in writers:
        if all(module.fits(part) for part in draft.parts):
            return module.write(draft), draft.tensors
    odd = next((part for part in draft.parts if not any(module.fits(part) for module in writers)), None)
    if odd is None:
        raise draft.refuse("its parts", "they are of kinds that PEFT keeps in different files")
    raise draft.refuse(
        f"{type(odd).__name__} at {odd.site.name or 'the model'}",
        'PEFT has no such part; save it with format="deltaworks"',
    )
