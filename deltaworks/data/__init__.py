"""Data: formats in, tokenised and packed batches out.

```python
data = load("chats.jsonl")                              # or a folder, CSV, Parquet, a Hugging Face name, nursery:NAME
prepared = prepare(data, "causal-lm", tokenizer, max_length=1024, packing=True)
Trainer(model, TrainingArguments(**prepared.arguments), train_dataset=prepared.train,
        eval_dataset=prepared.validation, data_collator=prepared.collator, callbacks=prepared.callbacks)
```

`formats` lists the shapes that are recognised, `preparing.TASKS` what each task learns from, `packing` how documents in
one sequence are kept apart. Nothing here depends on a method or a trainer.
"""

from .bad_rows import BadRow
from .collate import num_supervised_tokens
from .formats import FORMATS
from .labels import Labels
from .loading import Data, load
from .order import EpochSampler, epoch_order
from .packing import check_packing
from .preparing import TASKS, Prepared, prepare
from .tokens import PLAIN_CHAT_TEMPLATE, Tally

__all__ = [
    "FORMATS",
    "PLAIN_CHAT_TEMPLATE",
    "TASKS",
    "BadRow",
    "Data",
    "EpochSampler",
    "Labels",
    "Prepared",
    "Tally",
    "check_packing",
    "epoch_order",
    "load",
    "num_supervised_tokens",
    "prepare",
]
