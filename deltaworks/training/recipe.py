"""A recipe: everything a run needs, in one YAML file whose keys are the command line's options.

base: nursery:decoder
data: nursery:docstrings
method: lora
settings: {rank: 16, on: attention}
steps: 200
"""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import yaml

from ..core import fields
from ..core.method import Method
from ..core.registry import find, make
from ..model.loading import QUANTISED, TASKS
from . import yaml_file
from .choices import LOSSES

SCHEDULES = ("linear", "cosine", "constant", "polynomial", "inverse_sqrt")
OPTIMIZERS = ("adamw", "sgd", "adafactor", "adamw_8bit", "paged_adamw", "paged_adamw_8bit")


def _share(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1


@dataclass(kw_only=True, frozen=True)
class Recipe:
    """A run, as a person describes it.

    Raises:
        ValueError: one line for a key, a method or a hyper-parameter that does not exist or has an impossible value.
    """

    slug: ClassVar[str] = "recipe"

    base: str = fields.text("nursery:decoder", "model to start from: a folder, a name on the Hub, or nursery:NAME")
    data: str = fields.text("nursery:docstrings", "what to learn: a file, a folder, a data set's name, or nursery:NAME")
    task: str | None = fields.declared(
        None, "what is learned; by default what the data look like", f"one of {', '.join(TASKS)}, or none",
        lambda v: v is None or v in TASKS,
    )  # fmt: skip
    method: str = fields.text("lora", "how: a slug of `deltaworks methods`")
    settings: dict[str, Any] = fields.mapping("the method's hyper-parameters")
    also: str | list[str] | None = fields.declared(
        None, "further places whose own parameters are trained and saved, as `on=` names them; a new head always is",
        "a role, a regular expression, a list of these, or none",
        lambda v: v is None or (isinstance(v, (str, list)) and bool(v) and all(isinstance(i, str) for i in v)),
    )  # fmt: skip

    steps: int | None = fields.positive(None, "optimizer steps; instead of epochs", optional=True)  # type: ignore[arg-type]
    epochs: float | None = fields.number(None, "passes over the data; 1 when neither is given", above=0)
    batch_size: int = fields.positive(8, "examples in one forward pass")
    accumulation: int = fields.positive(1, "forward passes in one optimizer step")
    lr: float | None = fields.number(None, "learning rate; by default the method's own", above=0)
    schedule: str = fields.choice("linear", SCHEDULES, "how the learning rate goes on after warming up")
    warmup: float = fields.number(0.03, "steps over which the learning rate rises; below 1 a share of all", low=0)
    optimizer: str = fields.choice(
        "adamw", OPTIMIZERS, "what makes a step of gradients; those of 8 bits and paged ones are bitsandbytes'"
    )
    weight_decay: float = fields.number(0.0, "decay of trained tensors", low=0)
    clip: float = fields.number(1.0, "largest norm of the gradient; 0 for no bound", low=0)
    checkpointing: bool = fields.flag(False, "compute activations again in the backward pass: less memory, more time")

    max_length: int | None = fields.whole(512, "longest example, in tokens", low=8, optional=True)
    packing: bool = fields.flag(False, "several examples in one sequence, none of which sees another (causal-lm)")
    completion_only: bool = fields.flag(True, "learn answers, not prompts")
    choice_loss: str = fields.choice(
        "t-few", LOSSES, "what is learned of choices: T-Few's three terms, or the right one's likelihood"
    )
    validation: float | str | None = fields.declared(
        0.1, "what is held out: a share of the data, a file, or the name of a split; 0 for nothing",
        "a share of at least 0 and below 1, a file or a split's name",
        lambda v: v is None or isinstance(v, str) or _share(v),
    )  # fmt: skip
    split: str = fields.text("train", "which split of the data is trained on")
    limit: int | None = fields.positive(None, "at most this many rows to learn from", optional=True)  # type: ignore[arg-type]
    format: str | None = fields.text(None, "shape of the rows, such as prompt-completion; recognised by default")
    columns: dict[str, str] = fields.mapping("columns by their meaning, such as {prompt: question}")
    on_bad_row: str = fields.choice("stop", ("stop", "skip"), "what to do with a broken row")
    mask: float = fields.fraction(0.15, "share of tokens that are masked (masked-lm)")

    dtype: str | None = fields.text(None, "of the base: float32, bfloat16, float16; by default as it is stored")
    quantize: str | None = fields.declared(
        None, "how the base's weights are stored", f"one of {', '.join(QUANTISED)}, or none",
        lambda v: v is None or v in QUANTISED,
    )  # fmt: skip
    device: str | None = fields.text(None, "cpu, cuda, ...; by default a GPU if there is one")
    trust_remote_code: bool = fields.flag(False, "allow code that comes with the base to run")

    seed: int = fields.whole(0, "fixes everything random")
    save_every: int | None = fields.whole(
        None, "steps between checkpoints; by default a tenth of the run, 0 for none", low=0, optional=True
    )
    keep: int = fields.positive(2, "checkpoints that are kept")
    evaluate_every: int | None = fields.positive(None, "steps between evaluations", optional=True)  # type: ignore[arg-type]
    samples: int = fields.whole(3, "held-out examples that are generated before and after")
    sample_length: int = fields.positive(64, "longest generated answer, in tokens")
    measure: int = fields.positive(8, "batches that methods look at which measure before they attach")
    output: str | None = fields.text(None, "folder of the results; by default runs/BASE-METHOD")

    def __post_init__(self) -> None:
        fields.checked(self)
        if self.steps is not None and self.epochs is not None:
            raise ValueError(f"recipe: steps={self.steps} and epochs={self.epochs:g} are both given; give one")
        object.__setattr__(self, "settings", fields.parse(find(self.method), self.settings))
        made = self.made()
        if any(isinstance(value, Method) for value in self.settings.values()):  # a file holds its slug
            object.__setattr__(self, "settings", made.changed())

    def made(self) -> Method:
        """The method with its hyper-parameters."""
        return make(self.method, **self.settings)

    def complete(self) -> Recipe:
        """The recipe with everything written out that it leaves to defaults that depend on other keys."""
        name = self.base.replace("nursery:", "nursery-").rstrip("/").rpartition("/")[2]
        return dataclasses.replace(
            self,
            settings=fields.parse(find(self.method), self.settings),
            epochs=1.0 if self.steps is None and self.epochs is None else self.epochs,
            lr=self.made().default_lr if self.lr is None else self.lr,
            output=self.output or os.path.join("runs", f"{name}-{find(self.method).slug}"),
        )

    def as_dict(self) -> dict[str, Any]:
        """Every key, in the order of declaration."""
        return {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}

    def text(self) -> str:
        """The recipe as YAML."""
        return yaml.safe_dump(self.as_dict(), sort_keys=False, allow_unicode=True)

    @classmethod
    def of(cls, *sources: Mapping[str, Any]) -> Recipe:
        """A recipe of several mappings, later ones winning; `settings` are merged unless the method changes.

        Raises:
            ValueError: for an unknown key, naming the nearest.
        """
        merged: dict[str, Any] = {}
        for source in sources:
            given = {_key(name): value for name, value in source.items()}
            settings = given.pop("settings", None)
            if "method" in given and given["method"] != merged.get("method", cls.method):
                merged.pop("settings", None)
            for one, other in (("steps", "epochs"), ("epochs", "steps")):
                if given.get(one) is not None and given.get(other) is None:
                    merged.pop(other, None)
            merged |= given
            if settings is not None and not isinstance(settings, Mapping):
                raise ValueError(f"recipe: settings={settings!r} is not allowed; it must be a mapping")
            if settings:
                merged["settings"] = {**merged.get("settings", {}), **settings}
        return cls(**{name: _number(name, value) for name, value in merged.items()})

    @classmethod
    def read(cls, path: str | Path, **options: Any) -> Recipe:
        """A recipe from a YAML file, with options that win over it.

        Raises:
            OSError: when the file cannot be read.
            ValueError: when it is not a recipe.
        """
        return yaml_file.read(path, options, cls.of, kind=cls.slug, example="base")


def _key(name: str) -> str:
    known = [item.name for item in dataclasses.fields(Recipe)]
    plain = name.replace("-", "_")
    if plain in known:
        return plain
    near = difflib.get_close_matches(plain, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
    raise ValueError(f"recipe has no key {name!r}; {hint}")


def _number(name: str, value: Any) -> Any:
    """YAML reads 1e-3 as a text: what is declared as a number and looks like one becomes one."""
    declared = {item.name: str(item.type) for item in dataclasses.fields(Recipe)}[name]
    if isinstance(value, str) and ("int" in declared or "float" in declared):
        for kind in (int, float):
            try:
                return kind(value)
            except ValueError:
                continue
    return value


def differing(one: Recipe, other: Recipe, ignoring: Sequence[str] = ()) -> list[str]:
    """The keys in which two recipes differ."""
    left, right = one.as_dict(), other.as_dict()
    return [key for key in left if key not in ignoring and left[key] != right[key]]
