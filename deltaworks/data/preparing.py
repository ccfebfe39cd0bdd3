"""From canonical rows to what a trainer takes: token ids, labels, a collator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from datasets import Dataset, Features, List, Value
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
)

from . import encoders
from .bad_rows import BadRow, Gate, Unfit
from .collate import ChoiceCollator, ImageCollator, MaskingCollator
from .labels import Labels
from .loading import Data
from .packing import PackedCollator, pack, padding_collator
from .tokens import IGNORED, CausalEncoder, Tally, with_padding

if TYPE_CHECKING:
    from transformers import TrainerCallback

TASKS: dict[str, tuple[str, ...]] = {
    "causal-lm": ("chat", "prompt-completion", "instruction", "source-target", "text"),
    "sequence-classification": ("text-label",),
    "regression": ("text-label",),
    "token-classification": ("tokens-tags",),
    "seq2seq": ("source-target", "prompt-completion", "instruction"),
    "masked-lm": ("text", "text-label"),
    "multiple-choice": ("prompt-choices",),
    "image-classification": ("image-label",),
    "preference": ("preference",),
}
"""The tasks, each with the formats it learns from."""


@dataclass(frozen=True)
class Prepared:
    """What a trainer takes: `Trainer(train_dataset=p.train, eval_dataset=p.validation, data_collator=p.collator,
    callbacks=p.callbacks, args=TrainingArguments(**p.arguments, ...))`.

    - `collator`: `None` where TRL's trainer brings its own (`preference`).
    - `labels`: for `from_pretrained(**labels.for_config)`, where the task has labels.
    - `pad_token_id`: what sequences are padded with; a model that looks for the last real token must know it.
    - `tallies`: per split, what became of the rows.
    - `refused`: rows that could not be prepared, when bad rows are skipped.
    """

    task: str
    train: Dataset
    validation: Dataset | None
    collator: Callable[..., Any] | None
    labels: Labels | None
    pad_token_id: int | None
    packed: bool
    tallies: dict[str, Tally]
    refused: list[BadRow]
    callbacks: list[TrainerCallback] = field(default_factory=list)

    @property
    def arguments(self) -> dict[str, Any]:
        """What `TrainingArguments` must be given: columns that only the collator reads must survive."""
        return {"remove_unused_columns": False, "label_names": ["labels"]}

    @property
    def num_supervised_tokens(self) -> int:
        """Terms in the loss of one epoch of training; for masked-lm the tokens that masks are drawn from."""
        return self.tallies["train"].supervised

    @property
    def description(self) -> dict[str, Any]:
        """Numbers for a report: per split rows, examples, tokens, supervised, cut, dropped."""
        splits = {name: asdict(tally) for name, tally in self.tallies.items()}
        return {"task": self.task, "packed": self.packed, "refused": len(self.refused), **splits}


def prepare(
    data: Data,
    task: str,
    processor: Any,
    *,
    max_length: int | None = 512,
    packing: bool = False,
    flatten: bool = False,
    completion_only: bool = True,
    mask_probability: float = 0.15,
    image_size: int | tuple[int, int] = 224,
    channels: int = 3,
    pad_to_multiple_of: int | None = None,
    seed: int = 0,
) -> Prepared:
    """Tokenises canonical rows for a task.

    **Arguments:**

    - `data`: what `load` returned.
    - `task`: one of `TASKS`.
    - `processor`: the base's tokenizer; for images its image processor, or `None` to resize to `image_size`.
    - `max_length`: longest sequence in tokens. Texts are cut into pieces, prompts lose their beginning, chats their
      end; every row that lost tokens is counted.
    - `packing`, `flatten`: see `packing`; causal-lm only. Only training rows are packed with `packing`, so that the
      held-out loss does not depend on it.
    - `completion_only`: the loss counts completions and assistant turns only.
    - `mask_probability`: share of tokens that masked-lm masks.
    - `image_size`, `channels`: what the base takes, used when there is no image processor.
    - `pad_to_multiple_of`: pads batches to a multiple of this length.
    - `seed`: for the masks.

    **Raises:** `ValueError` when task and data do not go together, or for a row as `load` does.
    """
    if task not in TASKS:
        raise ValueError(f"task is {task!r}; known are {', '.join(TASKS)}")
    if data.format not in TASKS[task]:
        fitting = [name for name, formats in TASKS.items() if data.format in formats]
        raise ValueError(
            f"task {task} learns from {' or '.join(TASKS[task])}, the data are {data.format}; "
            f"such data go with {', '.join(fitting)}"
        )
    if max_length is not None and max_length < 8:
        raise ValueError(f"max_length is {max_length}; at least 8 tokens are needed")
    if packing and task != "causal-lm":
        raise ValueError(f"packing goes with causal-lm only, the task is {task}")
    if packing and max_length is None:
        raise ValueError("packing needs a max_length, the length of the rows that are filled")
    if flatten and not packing:
        raise ValueError("flatten makes one row of packed rows; it needs packing")
    if task == "preference":
        return _untouched(data, task, None)
    if task == "image-classification":
        assert data.labels is not None
        size = (image_size, image_size) if isinstance(image_size, int) else image_size
        several = data.labels.problem_type == "multi_label_classification"
        return _untouched(
            data, task, ImageCollator(processor, size, channels, data.labels.num_labels if several else None)
        )

    if processor is None:
        raise ValueError(f"task {task} needs the base's tokenizer")
    tokenizer = with_padding(processor)
    pad_id = int(tokenizer.pad_token_id)
    labels = None if task == "masked-lm" else data.labels
    callbacks: list[TrainerCallback] = []
    pad: dict[str, Any] = {"pad_to_multiple_of": pad_to_multiple_of}
    collator: Any
    if task == "causal-lm":
        encode = CausalEncoder(tokenizer, max_length, completion_only)
        if packing:
            collator = PackedCollator(pad_id, pad_to_multiple_of, flatten)
        else:
            collator = padding_collator(pad_id, pad_to_multiple_of)
    elif task in ("sequence-classification", "regression"):
        assert data.labels is not None
        labels, value = _regression(data.labels) if task == "regression" else (data.labels, None)
        encode = encoders.sequence_classification(tokenizer, max_length, labels, value)
        collator = DataCollatorWithPadding(tokenizer, **pad)
    elif task == "token-classification":
        encode = encoders.token_classification(tokenizer, max_length)
        collator = DataCollatorForTokenClassification(tokenizer, **pad)
    elif task == "multiple-choice":
        encode = encoders.multiple_choice(tokenizer, max_length)
        collator = ChoiceCollator(pad_id, pad_to_multiple_of)
    elif task == "seq2seq":
        encode = encoders.seq2seq(tokenizer, max_length)
        collator = DataCollatorForSeq2Seq(tokenizer, **pad)
    else:
        encode = encoders.masked_lm(tokenizer, max_length)
        collator = MaskingCollator(tokenizer, mask_probability, seed, **pad)
        from .epochs import EpochCallback

        callbacks.append(EpochCallback(collator))

    gate = Gate(data.on_bad_row)
    per_token = task not in ("sequence-classification", "regression")
    tallies = {"train": Tally(), "validation": Tally()}
    train = _encoded(data, "train", encode, tallies["train"], gate, per_token)
    validation = None
    if data.validation is not None:
        validation = _encoded(data, "validation", encode, tallies["validation"], gate, per_token)
    else:
        del tallies["validation"]
    if not train:
        raise ValueError(f"no training row has anything to learn within max_length {max_length}")
    if isinstance(collator, MaskingCollator) and validation:
        # Held-out rows are masked once, so that losses of different epochs are comparable.
        validation = [collator.masked_once(example) for example in validation]
    train_set, validation_set = _dataset(train), _dataset(validation) if validation else None
    if packing:
        assert max_length is not None
        train_set = pack(train_set, max_length)
        tallies["train"].examples = len(train_set)
        if validation:
            validation_set = _dataset([e | {"seq_lengths": [len(e["input_ids"])]} for e in validation])
    return Prepared(
        task=task,
        train=train_set,
        validation=validation_set,
        collator=collator,
        labels=labels,
        pad_token_id=pad_id,
        packed=packing,
        tallies=tallies,
        refused=gate.skipped,
        callbacks=callbacks,
    )


def _encoded(
    data: Data, split: str, encode: encoders.Encode, tally: Tally, gate: Gate, per_token: bool
) -> list[dict[str, Any]]:
    """The examples of a split; a row that the tokenizer or its template refuses is a bad row."""
    rows: Any = data.train if split == "train" else data.validation
    examples: list[dict[str, Any]] = []
    for index, row in enumerate(rows):
        try:
            examples += encode(row, tally)
        except Unfit as error:
            gate.refuse(BadRow(data.place(split, index), str(error)))
    tally.examples = len(examples)
    for example in examples:
        tally.tokens += len(example["input_ids"])
        if "special_tokens_mask" in example:
            tally.supervised += example["special_tokens_mask"].count(0)
        elif per_token:
            tally.supervised += sum(label != IGNORED for label in example["labels"])
        else:
            tally.supervised += 1
    return examples


def _dataset(examples: list[dict[str, Any]]) -> Dataset:
    """Integers as 32 bits: token ids, lengths and masks are most of what is stored."""
    kinds: dict[str, Any] = {}
    for column, value in examples[0].items():
        items = value if isinstance(value, list) else [value]
        kind = Value("float32" if any(isinstance(item, float) for item in items) else "int32")
        kinds[column] = List(kind) if isinstance(value, list) else kind
    return Dataset.from_list(examples, features=Features(kinds))


def _regression(labels: Labels) -> tuple[Labels, Callable[[Any], float] | None]:
    """Labels as numbers, and how a class whose name is a number becomes one.

    **Raises:** `ValueError` when the labels are no numbers.
    """
    if labels.problem_type == "regression":
        return labels, None
    try:
        numbers = [float(name) for name in labels.names]
    except ValueError:
        numbers = []
    if not numbers or labels.problem_type == "multi_label_classification":
        raise ValueError(f"task regression needs numbers; the labels are {', '.join(labels.names[:5])}")
    return Labels("regression", ("value",)), lambda label: numbers[label]


def _untouched(data: Data, task: str, collator: Callable[..., Any] | None) -> Prepared:
    """Rows that a collator or TRL's trainer turns into tensors itself."""
    splits = {"train": data.train, "validation": data.validation}
    return Prepared(
        task=task,
        train=data.train,
        validation=data.validation,
        collator=collator,
        labels=data.labels,
        pad_token_id=None,
        packed=False,
        tallies={
            name: Tally(rows=len(rows), examples=len(rows), supervised=len(rows))
            for name, rows in splits.items()
            if rows is not None
        },
        refused=[],
    )
