"""Training: runs that stop safely, in `transformers.Trainer`, in TRL's trainers, and behind `deltaworks tune`.

    trainer = dw.training.wrap(SFTTrainer)(model, args, train_dataset=data, processing_class=tokenizer)
    result = dw.training.tune(dw.training.Recipe(base="nursery:decoder", data="nursery:docstrings"))
"""

from .callback import DeltaworksCallback
from .memory import keeping_freed
from .mixin import DeltaworksMixin, wrap
from .recipe import Recipe
from .tune import Result, tune

__all__ = ["DeltaworksCallback", "DeltaworksMixin", "Recipe", "Result", "keeping_freed", "tune", "wrap"]
