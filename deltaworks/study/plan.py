"""What a run would need and take, before a weight is loaded.

For every method a training step is made on shapes (`study.step`): the same model, the same parts, the same loss and
optimizer as in `tune`, every operator with its real sizes and none of its numbers. Memory is counted, not modelled:
storages are entered when they are made and crossed out when they are freed, and the most that was there at once is the
prediction. Time is the roofline's: an operator takes as long as the slower of its arithmetic and its memory traffic on
this machine, relative to the frozen base's forward and backward pass.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import importlib.util
import inspect
import logging
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from ..core.attach import attach, detach
from ..core.method import Method
from ..core.registry import make
from ..core.tuned import base_size
from ..data import Prepared, epoch_order
from ..model.anatomy import FRESH, describe
from ..model.loading import PACKAGES, TASKS, as_dtype, load_meta
from ..nursery import PREFIX, base_path
from ..training.recipe import Recipe
from .machine import Machine, gauge
from .memory import free, shown
from .packed import choose, pack
from .shapes import KINDS, Effort, Shapes
from .step import Step, Work, frozen, step

USUAL = ("lora", "dora", "vera", "ia3", "houlsby", "prefix_tuning", "lst", "mezo", "full")
"""Methods that are compared when none are named: one of every kind."""

# Larger batches are not tried on shapes, whose indices and masks are real, but extrapolated.
TRIED_TOKENS = 1 << 16
MOST = 1 << 20
SIZES = (*KINDS, "saved")


@dataclass(frozen=True, kw_only=True)
class Change:
    """Something to do so that a run fits, and what it would need then.

    Attributes:
        what: as an option of `deltaworks tune`, such as `--checkpointing`, or another `--method`.
        peak: bytes.
        fits: whether that is enough.
        time: of a step over the frozen base's step before the change; None where that is not known.
    """

    what: str
    peak: int
    fits: bool
    time: float | None


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What a method would need.

    Attributes:
        method: its slug.
        trainable: values that train; `share` of the base's.
        stored_bytes: of the adapter's tensors.
        dtype: of the base's weights.
        step: memory, split.
        time: of a step over the frozen base's forward and backward pass; None where that cannot be run.
        fits: whether the peak is within the memory; None when that is not known.
        largest_batch: examples that fit, 0 when not even one does; None when the memory is not known.
        changes: what would make it fit, when it does not.
    """

    method: str
    trainable: int
    share: float
    stored_bytes: int
    dtype: str
    step: Step
    time: float | None
    fits: bool | None
    largest_batch: int | None
    changes: tuple[Change, ...] = ()

    @property
    def peak(self) -> int:
        """Most memory at once, in bytes."""
        return self.step.peak


@dataclass(frozen=True)
class Lengths:
    """How long the batches of a data set are.

    Attributes:
        longest: tokens of the longest example.
        longest_target: of the longest target (seq2seq).
        tokens: in a batch on average, padding left out.
        padding: share of a batch that is padding, 0 to 1.
        supervised: share of the other tokens that have a target, 0 to 1.
        sequences: that an example is at most; more than one for multiple-choice.
    """

    longest: int
    longest_target: int | None
    tokens: float
    padding: float
    supervised: float
    sequences: int = 1


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A plan for several methods.

    Attributes:
        base: the base's name; `parameters`, how many it has.
        work: the batch that is planned for, the largest of the data.
        lengths: of the data, None without data.
        device: where; `memory`, bytes that it may take there, None when unknown.
        forecasts: of the methods that can be planned, in the order asked for.
        reasons: why others cannot, by slug.
    """

    base: str
    parameters: int
    work: Work
    lengths: Lengths | None
    device: str
    memory: int | None
    forecasts: tuple[Forecast, ...]
    reasons: dict[str, str] = field(default_factory=dict)

    @property
    def fitting(self) -> list[Forecast]:
        """The methods that fit as they are, the leanest first."""
        return sorted((one for one in self.forecasts if one.fits), key=lambda one: one.peak)


def plan(
    recipe: Recipe, methods: Sequence[Method] | None = None, *, memory: int | None = None,
    prepared: Prepared | None = None, tell: Callable[[str], None] = lambda slug: None, search: bool = True,
) -> Plan:  # fmt: skip
    """Predict memory, sizes and time of a recipe with several methods; no weight is loaded.

    Args:
        recipe: base, batch, lengths, optimizer and the rest, as for `tune`.
        methods: what to plan; the recipe's own by default.
        memory: bytes that the run may take; by default what the device has free now.
        prepared: the data as the base reads them; without, every example is as long as `max_length`.
        tell: called with each method's slug before its turn.
        search: look for the largest batch and for changes as well.

    Raises:
        ValueError, OSError: one line, when there is no such base, or the task or a setting is not for it.
    """
    place = str(base_path(recipe.base)) if recipe.base.startswith(PREFIX) else recipe.base
    device = recipe.device or ("cuda" if torch.cuda.is_available() else "cpu")
    memory = free(device) if memory is None else memory
    task = recipe.task or (prepared.task if prepared is not None else likely_task(place, recipe))
    texts = prepared is not None and "input_ids" in prepared.train.column_names
    lengths = _lengths(prepared, recipe) if prepared is not None and texts else None
    site = _Site(place, task, recipe, device, prepared)
    work = _work(task, recipe, lengths, site.config)
    if lengths is not None and work.padded and task == "causal-lm":
        # Rows of several examples, as many of these in a step as before, without the padding.
        length = _work(task, recipe, None, site.config).length
        rows = math.ceil(lengths.tokens / length)
        if rows * length < work.batch_size * work.length:
            site.packed = replace(work, batch_size=rows, length=length, padded=False, packed=True)
    chosen = [recipe.made()] if methods is None else list(methods)
    forecasts: list[Forecast] = []
    reasons: dict[str, str] = {}
    for method in chosen:
        tell(method.slug)
        try:
            forecasts.append(_forecast(method, site, work, recipe, memory, search))
        except Exception as failure:  # what a page or a model needs that shapes cannot give is no fault of the rest
            reasons[method.slug] = _line(failure)
    if search and memory is not None and forecasts and not any(one.fits for one in forecasts):
        leaner = tuple(_leaner({method.slug for method in chosen}, site, work, recipe, memory))
        forecasts = [replace(one, changes=one.changes + leaner) for one in forecasts]
    return Plan(
        base=recipe.base, parameters=site.parameters, work=work, lengths=lengths, device=device, memory=memory,
        forecasts=tuple(forecasts), reasons=reasons,
    )  # fmt: skip


def warning(recipe: Recipe, prepared: Prepared | None = None) -> str | None:
    """One line when a run's plan says that it will not fit the free memory of its device; None when it does.

    Never raises: what cannot be planned is not warned of.
    """
    try:
        made = plan(recipe, prepared=prepared, search=False)
    except Exception:
        return None
    if not made.forecasts or made.memory is None or made.forecasts[0].peak <= made.memory:
        return None
    return (
        f"this run may need {shown(made.forecasts[0].peak)}, {shown(made.memory)} are free on {made.device}; "
        f"`deltaworks plan` with this base, data and method (--methods) says what to change"
    )


def likely_task(place: str, recipe: Recipe) -> str:
    """What a base is for, by its configuration: the task its checkpoint was made for."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(place, trust_remote_code=recipe.trust_remote_code)
    except (OSError, ValueError):
        return "causal-lm"  # opening the base says what is wrong with it
    if getattr(config, "is_encoder_decoder", False):
        return "seq2seq"
    name = (getattr(config, "architectures", None) or [""])[0]
    others = ("regression", "multiple-choice")  # which have the classes of other tasks
    forms = {kind.removeprefix("AutoModel"): task for task, kind in TASKS.items() if task not in others}
    return next((task for form, task in forms.items() if name.endswith(form)), "causal-lm")


# The batch


def _lengths(prepared: Prepared, recipe: Recipe) -> Lengths:
    """Look at the batches of the first epoch, as `tune` would make them."""
    several = prepared.task == "multiple-choice"
    ids = prepared.train["lengths"][:] if several else [[len(row)] for row in prepared.train["input_ids"]]
    order = epoch_order(len(ids), recipe.seed, 0)
    size = recipe.batch_size
    batches = [
        [length for row in order[start : start + size] for length in ids[row]] for start in range(0, len(ids), size)
    ]
    shape = sum(max(batch) * len(batch) for batch in batches)
    tokens = sum(map(sum, batches))
    targets = [len(row) for row in prepared.train["labels"]] if prepared.task == "seq2seq" else []
    return Lengths(
        longest=max(map(max, ids)),
        longest_target=max(targets) if targets else None,
        tokens=tokens / len(batches),
        padding=1 - tokens / shape,
        supervised=min(1.0, prepared.num_supervised_tokens / tokens),
        sequences=max(map(len, ids)),
    )


def _work(task: str, recipe: Recipe, lengths: Lengths | None, config: Any) -> Work:
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None) or 512
    if lengths is None:
        length = limit if recipe.max_length is None else min(recipe.max_length, limit)
        return Work(task=task, batch_size=recipe.batch_size, length=length, packed=recipe.packing)
    return Work(
        task=task, batch_size=recipe.batch_size * lengths.sequences, length=lengths.longest,
        target_length=lengths.longest_target,
        # Prompts have no target; how many tokens of the longest batch have one is what they have on average.
        supervised=lengths.supervised if task == "causal-lm" else 1.0,
        padded=lengths.padding > 0 and not recipe.packing, packed=recipe.packing,
    )  # fmt: skip


# The base


class _Site:
    """The base on shapes, in whatever dtype and form a method takes it.

    Attributes:
        packed: the batch's examples without padding, where that is less.
    """

    packed: Work | None = None

    def __init__(self, place: str, task: str, recipe: Recipe, device: str, prepared: Prepared | None) -> None:
        self.place, self.task, self.recipe, self.device = place, task, recipe, device
        labels = prepared.labels if prepared is not None and task not in ("causal-lm", "seq2seq", "masked-lm") else None
        self.id2label = labels.id2label if labels is not None else None
        self.problem = labels.problem_type if labels is not None and task != "token-classification" else None
        spare = self._spare = self._meta()
        self.config, self.parameters = spare.config, base_size(spare)
        self._made: dict[tuple[torch.dtype | None, str | None], tuple[Shapes, nn.Module]] = {}
        self._limits: dict[torch.dtype, tuple[Effort | None, Machine]] = {}

    def _meta(self) -> Any:
        model = load_meta(
            self.place, self.task, id2label=self.id2label, trust_remote_code=self.recipe.trust_remote_code
        )
        if self.problem is not None:
            model.config.problem_type = self.problem
        if getattr(model.config, "pad_token_id", 0) is None:
            model.config.pad_token_id = 0
        if type(model).__name__ not in (getattr(model.config, "architectures", None) or [type(model).__name__]):
            # Another class than the checkpoint's: what lies outside the backbone is new.
            fresh = {name.rpartition(".")[0] for name, _ in model.named_parameters()}
            prefix = f"{model.base_model_prefix}."
            object.__setattr__(model, FRESH, sorted(path for path in fresh if not f"{path}.".startswith(prefix)))
        describe(model)
        return model

    def opened(self, method: Method, quantize: str | None) -> tuple[Shapes, nn.Module, torch.dtype]:
        """A mode and the base in it, as `tune` would load it for this method."""
        wanted = as_dtype(self.recipe.dtype)
        if self.recipe.dtype is None and method.family == "fullparam" and not any(r.owns_step for r in method.rules()):
            wanted = torch.float32
        dtype = wanted if isinstance(wanted, torch.dtype) else None
        if (dtype, quantize) not in self._made:
            model, shapes = self._spare or self._meta(), Shapes(self.device)
            self._spare = None
            shapes.empty(model, dtype)
            if quantize is not None:
                pack(model, choose(describe(model), quantize), quantize, shapes)
            self._made[dtype, quantize] = shapes, model
        shapes, model = self._made[dtype, quantize]
        own = next((p.dtype for p in model.parameters() if p.is_floating_point() and p.dtype.itemsize > 1), None)
        return shapes, model, own or torch.float32

    def limit(self, shapes: Shapes, model: nn.Module, dtype: torch.dtype, work: Work) -> tuple[Effort | None, Machine]:
        """The frozen base's effort for a batch, and how fast this machine is in a dtype."""
        if dtype not in self._limits:
            try:
                effort = frozen(shapes, model, work)
            except Exception:  # a base whose inputs have no gradient has no such step
                effort = None
            self._limits[dtype] = effort, gauge(self.device, dtype)
        return self._limits[dtype]


# One method


def _forecast(
    method: Method, site: _Site, work: Work, recipe: Recipe, memory: int | None, search: bool
) -> Forecast:  # fmt: skip
    shapes, model, dtype = site.opened(method, recipe.quantize)
    effort, machine = site.limit(shapes, model, dtype, work) if search else (None, None)
    also = describe(model).head_new
    with _attached(method, shapes, model, recipe, also) as tuned:
        summary = tuned.summary()

        def once(work: Work, checkpointing: bool) -> Step:
            with _quiet():
                return step(
                    shapes, tuned, work, optimizer=recipe.optimizer, clip=recipe.clip, checkpointing=checkpointing
                )

        def at(work: Work, checkpointing: bool = recipe.checkpointing) -> Step:
            return _extrapolated(lambda work: once(work, checkpointing), work)

        own = at(work)

        def time(effort: Effort) -> float | None:
            return machine.seconds(effort) / unit if machine is not None and unit else None

        unit = machine.seconds(effort) if machine is not None and effort is not None else None
        fits = None if memory is None else own.peak <= memory
        largest = None
        changes: list[Change] = []

        def change(what: str, other: Step, passes: int = 1) -> Change:
            once = time(other.effort)
            taken = None if once is None else passes * once
            return Change(what=what, peak=other.peak, fits=other.peak <= (memory or 0), time=taken)

        if memory is not None and search:
            largest = _largest(lambda size: at(replace(work, batch_size=size)).peak, work, own.peak, memory)
        if fits is False and search:
            if 0 < (largest or 0) < work.batch_size:
                # The same examples in one optimizer step, in several passes.
                passes = -(-work.batch_size // (largest or 1))
                size = -(-work.batch_size // passes)
                what = f"--batch-size {size} --accumulation {passes * recipe.accumulation}"
                changes.append(change(what, at(replace(work, batch_size=size)), passes))
            if not recipe.checkpointing and getattr(model, "supports_gradient_checkpointing", False):
                changes.append(change("--checkpointing", at(work, True)))
            if site.packed is not None and "position_ids" in inspect.signature(type(model).forward).parameters:
                what = f"--packing --batch-size {site.packed.batch_size}"
                changes.append(change(what, at(site.packed)))
            if work.task != "image-classification" and work.length >= 64:
                half = work.length // 2
                changes.append(change(f"--max-length {half}", at(replace(work, length=half))))
    if fits is False and search and recipe.quantize is None:
        changes += _quantised(method, site, work, recipe, also, change)
    return Forecast(
        method=method.slug, trainable=summary.trainable, share=summary.share, stored_bytes=summary.stored_bytes,
        dtype=str(dtype).removeprefix("torch."), step=own, time=time(own.effort),
        fits=fits, largest_batch=largest, changes=tuple(changes),
    )  # fmt: skip


def _extrapolated(make: Callable[[Work], Step], work: Work) -> Step:
    """A step, or for a batch too large to be tried one that continues the line through two smaller ones."""
    most = max(1, TRIED_TOKENS // max(work.length, 1))
    if work.batch_size <= 2 * most:
        return make(work)
    less, more = make(replace(work, batch_size=most)), make(replace(work, batch_size=2 * most))
    ahead = (work.batch_size - 2 * most) / most
    sizes = {kind: round(getattr(more, kind) + ahead * (getattr(more, kind) - getattr(less, kind))) for kind in SIZES}
    factor = work.batch_size / (2 * most)
    calls = {(round(a * factor), round(b * factor)): n for (a, b), n in more.effort.calls.items()}
    return Step(**sizes, effort=Effort(calls))


def _quantised(
    method: Method, site: _Site, work: Work, recipe: Recipe, also: list[str], change: Callable[[str, Step], Change]
) -> Iterator[Change]:
    """Four bits a weight, where the method can live with them; with checkpointing as well, when that alone is short."""
    kind = "nf4" if _installed(PACKAGES["nf4"]) else "int8"
    try:
        shapes, model, _ = site.opened(method, kind)
        with _attached(method, shapes, model, recipe, also) as tuned, _quiet():
            for again in (False, True):
                if again and (recipe.checkpointing or not getattr(model, "supports_gradient_checkpointing", False)):
                    return
                settings = {"clip": recipe.clip, "checkpointing": again or recipe.checkpointing}
                other = _extrapolated(
                    lambda work, settings=settings: step(shapes, tuned, work, optimizer=recipe.optimizer, **settings),
                    work,
                )
                found = change(f"--quantize {kind}" + (" --checkpointing" if again else ""), other)
                yield found
                if found.fits:
                    return
    except Exception:  # a method that trains the base's own weights cannot
        return


def _leaner(planned: set[str], site: _Site, work: Work, recipe: Recipe, memory: int) -> Iterator[Change]:
    """Methods of other kinds that fit as they are, the leanest first."""
    found = []
    for slug in USUAL:
        if slug not in planned:
            with contextlib.suppress(Exception):  # what cannot be planned is not advised
                found.append(_forecast(make(slug), site, work, recipe, memory, search=False))
    for one in sorted(found, key=lambda one: one.peak):
        if one.fits:
            yield Change(what=f"--method {one.method}", peak=one.peak, fits=True, time=None)


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


@contextlib.contextmanager
def _attached(method: Method, shapes: Shapes, model: nn.Module, recipe: Recipe, new: list[str]) -> Iterator[Any]:
    also = [recipe.also] if isinstance(recipe.also, str) else list(recipe.also or ())
    also += [re.escape(path) for path in new]
    weights = shapes.ledger.now["weights"]
    with _quiet(), shapes:
        blind = _unmeasured(method) if method.needs_data else method
        tuned = attach(model, blind, name="plan", data=(), also=also or None)
    try:
        yield tuned
    finally:
        with shapes:
            detach(model, "plan")
        if shapes.ledger.now["weights"] > weights:
            gc.collect()


def _unmeasured(method: Method) -> Method:
    """The method with what stands in for its measurement in the measurement's place."""
    blind = copy.copy(method)
    object.__setattr__(blind, "measure", lambda base, batches: method.assumed(base))
    return blind


def _largest(peak_at: Callable[[int], int], work: Work, own: int, memory: int) -> int:
    """The largest batch that fits.

    The peak is the highest of several straight lines over the batch (one for each moment of the step), so a line
    through two of its points lies above it between them and below it outside: from the side that does not fit, the
    line through the last two points closes in.
    """
    known = {work.batch_size: own}

    def peak(size: int) -> int:
        if size not in known:
            known[size] = peak_at(size)
        return known[size]

    low, high = (work.batch_size, None) if own <= memory else (0, work.batch_size)
    if high == 1:
        return 0
    other = max(1, work.batch_size // 2) if work.batch_size > 1 else 2
    peak(other)
    while True:
        fitting = [size for size, needed in known.items() if needed <= memory]
        failing = [size for size, needed in known.items() if needed > memory]
        low, high = max(fitting, default=0), min(failing, default=None)
        if high == low + 1 or low >= MOST:
            return low
        left, right = sorted(known)[-2:] if high is None else (low, high) if low else sorted(known)[:2]
        slope = (known[right] - known[left]) / (right - left)
        if slope <= 0:
            return low if high is not None else MOST
        guess = right + math.floor((memory - known[right]) / slope)
        # Between two known points the line is above the peak: what it lets through fits. Outside it may flatter.
        guess = max(low + 1, guess) if high is None else min(high - 1, max(low + 1, guess))
        if guess >= MOST:
            return MOST
        if guess in known:
            return low
        peak(guess)
        if known[guess] <= memory and not _more(known, guess, memory):
            return guess


def _more(known: dict[int, int], size: int, memory: int) -> bool:
    """Whether one example more would fit, by the line through the two largest batches that are known."""
    left, right = sorted(known)[-2:]
    return known[size] + (known[right] - known[left]) / (right - left) <= memory


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch and transformers say of tensors that have no values."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _line(failure: Exception) -> str:
    text = " ".join(str(failure).split())
    return text if isinstance(failure, ValueError) else f"{type(failure).__name__}: {text}"[:200]


def usual() -> list[Method]:
    """The methods of `USUAL`, with their defaults."""
    return [make(slug) for slug in USUAL]
