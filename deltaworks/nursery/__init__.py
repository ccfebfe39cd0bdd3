"""Small pre-trained bases and real data that ship with the package or are built in seconds.

For the demo, the tests and the comparisons; a user with a model and data never needs it.

Bases: `decoder` (Llama, 5 M parameters, shipped), `encoder` (BERT), `seq2seq` (T5), `vision` (ViT), `conv` (ResNet),
`moe` (Mixtral), `ssm` (Mamba), `decoder-xs`, `decoder-s`, `decoder-m` for studies of scale, and `decoder-facts` for
studies of knowledge. Data: `docstrings` (signature -> docstring), `packages` (docstring -> package), `digits`,
`choices` (signature -> one of four docstrings), `holidays` (name in any language -> months), `profile` (docstrings of
users with a profile), `new-facts` and `changed-facts` (question -> answer), and tasks on code, which `code_sets`
describes: `functions`, `summaries`, `tests`, `programs`, `defects`, `clones`, `search`. Wherever the command line or a
recipe takes a base or data, they are addressed as `nursery:NAME`, the rows of one package of the standard library as
`nursery:NAME/PACKAGE`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from datasets import DatasetDict
    from transformers import PreTrainedModel

BASES = ("decoder", "encoder", "seq2seq", "vision", "conv", "moe", "ssm", "decoder-xs", "decoder-s", "decoder-m",
         "decoder-facts")  # fmt: skip
CODE = ("functions", "summaries", "tests", "programs", "defects", "clones", "search")
DATA = ("docstrings", "packages", "digits", "holidays", "choices", "profile", "new-facts", "changed-facts", *CODE)
DESCRIBED = ("docstrings", "packages", "choices")  # reading all documentation takes seconds: kept once made
NAMES = BASES + DATA
PREFIX = "nursery:"

__all__ = ["BASES", "DATA", "NAMES", "PREFIX", "base", "base_path", "data", "resolve"]


def _known(name: str, kind: str, names: tuple[str, ...]) -> str:
    bare = name.removeprefix(PREFIX)
    if bare not in names:
        listed = ", ".join(PREFIX + other for other in names)
        raise ValueError(f"the nursery has no {kind} {name!r}; there are {listed}")
    return bare


def base_path(name: str) -> Path:
    """The folder of a base, as `from_pretrained` takes it. All but the decoder are pre-trained on first use.

    Raises:
        ValueError: no base has this name.
        ImportError: `vision` or `conv` without scikit-learn or Pillow.
    """
    bare = _known(name, "base", BASES)
    from deltaworks.nursery import bases

    return bases.SHIPPED if bare == "decoder" else bases.cached(bare)


resolve = base_path


def base(name: str, *, dtype: torch.dtype | None = None) -> tuple[PreTrainedModel, Any]:
    """A base as (model, tokenizer), or (model, image processor) for pictures; float32 unless `dtype` says otherwise.

    The model is of the class it was pre-trained as, in evaluation mode: with its language-modelling head, or, for
    pictures, without a head.

    Raises:
        ValueError: no base has this name.
        ImportError: `vision` or `conv` without scikit-learn or Pillow.
    """
    import transformers

    folder = base_path(name)
    config = transformers.AutoConfig.from_pretrained(folder)
    architecture = getattr(transformers, (config.architectures or ["AutoModel"])[0])
    pictures = (folder / "preprocessor_config.json").is_file()
    reader = transformers.AutoImageProcessor if pictures else transformers.AutoTokenizer
    return architecture.from_pretrained(folder, dtype=dtype or torch.float32).eval(), reader.from_pretrained(folder)


def data(name: str) -> DatasetDict:
    """A data set with the splits `train` and `validation`, built from the running Python in a second or two.

    `NAME/PACKAGE` has only the rows of one top-level package, for tuning to a project.

    Raises:
        ValueError: no data set has this name, or no such part.
        ImportError: `digits` without scikit-learn or Pillow, `profile` without scikit-learn, `tests` where
            Python came without its own tests.
    """
    given, _, package = name.partition("/")
    bare = _known(given, "data set", DATA)
    from deltaworks.nursery import code_sets, knowledge, label_sets, profile_sets, sets
    from deltaworks.nursery.kept import kept_set

    if package:
        return (profile_sets if bare in profile_sets.SETS else code_sets).group(bare, package)
    make = (sets.SETS | code_sets.SETS | label_sets.SETS | profile_sets.SETS | knowledge.SETS)[bare]
    return kept_set(bare, make) if bare in DESCRIBED else make()
