"""Opening a base: by task, in a dtype, quantised if asked, or as a shape without weights."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .anatomy import FRESH, Anatomy, describe
from .kinds import base_modules, is_linear, linear_shape
from .weights import is_quantised, keep_differentiable

TASKS = {
    "causal-lm": "AutoModelForCausalLM",
    "sequence-classification": "AutoModelForSequenceClassification",
    "regression": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "masked-lm": "AutoModelForMaskedLM",
    "image-classification": "AutoModelForImageClassification",
    "multiple-choice": "AutoModelForCausalLM",
}
QUANTISED = ("int8", "int4", "nf4")
PACKAGES = {"int8": "torchao", "int4": "torchao", "nf4": "bitsandbytes"}


def load_base(
    name: str | os.PathLike[str],
    task: str = "causal-lm",
    *,
    quantize: str | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    num_labels: int | None = None,
    id2label: Mapping[int, str] | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """The model `name` for a task, in eval mode.

    Args:
        name: a folder, or a name on the Hugging Face Hub.
        task: one of `TASKS`.
        quantize: how the linear layers in the blocks are stored; heads and embeddings stay as they are. "int8" and
            "int4" (torchao, weight only) and "nf4" (bitsandbytes) run on CPU and GPU. int4 has 4-bit values in groups
            of at most 128 inputs, kept one to a byte: torchao's packed 4-bit kernels have no gradient, which training
            through a layer needs.
        dtype: of the weights that are not quantised, such as "bfloat16"; None for that of the checkpoint.
        device: where to; None leaves it on the CPU, a quantised model on the GPU if there is one.
        num_labels, id2label: of a new classification head.
        trust_remote_code: allow the model's own code, from its repository, to run.

    Raises:
        ValueError: an unknown task, dtype or quantisation, or one that this model cannot have.
        OSError: there is no such model, or its files are damaged.
        ImportError: quantisation needs a package that is not installed; the message says how to install it.
    """
    name = os.fspath(name)
    if quantize in ("", "none"):
        quantize = None
    labels = _labels(task, num_labels, id2label)
    kwargs: dict[str, Any] = {"dtype": as_dtype(dtype), "trust_remote_code": trust_remote_code, **labels}
    if quantize is not None:
        shape = load_meta(name, task, num_labels=num_labels, trust_remote_code=trust_remote_code)
        kwargs["quantization_config"] = quantisation(quantize, describe(shape), as_dtype(dtype))
        kwargs["device_map"] = {"": str(device or ("cuda" if torch.cuda.is_available() else "cpu"))}
    with _one_line(name, task, quantize):
        model, report = _auto(task).from_pretrained(name, output_loading_info=True, **kwargs)
    # What the checkpoint does not hold is random and must be trained, whatever the method: `Anatomy.head_new`.
    object.__setattr__(model, FRESH, sorted({key.rpartition(".")[0] for key in report["missing_keys"]} - {""}))
    if quantize is not None and not any(is_quantised(parameter) for parameter in model.parameters()):
        other = "; --quantize nf4 also covers GPT-2's Conv1D" if quantize != "nf4" else ""
        raise ValueError(f"{name}: {quantize} found no layer to quantise in {type(model).__name__}{other}")
    if quantize == "nf4":
        keep_differentiable(model)
    if quantize is None and device is not None:
        model = model.to(device)
    return model.eval()


def load_meta(
    name: str | os.PathLike[str],
    task: str = "causal-lm",
    *,
    num_labels: int | None = None,
    id2label: Mapping[int, str] | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """The model `name` as a shape: all tensors on the meta device, from its configuration alone.

    Raises:
        ValueError, OSError: as `load_base`.
    """
    from transformers import AutoConfig

    name = os.fspath(name)
    labels = _labels(task, num_labels, id2label)
    with _one_line(name, task):
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code, **labels)
        with torch.device("meta"):
            kept = config.dtype if isinstance(getattr(config, "dtype", None), torch.dtype) else torch.float32
            model = _auto(task).from_config(config, trust_remote_code=trust_remote_code, dtype=kept)
    model.tie_weights()
    return model.eval()


def load_tokenizer(name: str | os.PathLike[str], *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of `name`, with a padding token: the end-of-text token where it has none of its own."""
    from transformers import AutoTokenizer

    name = os.fspath(name)
    with _one_line(name, what="tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_processor(name: str | os.PathLike[str], *, trust_remote_code: bool = False) -> Any:
    """The image processor of `name`."""
    if importlib.util.find_spec("PIL") is None:
        raise ImportError('images need a package that is not installed: pip install "deltaworks[vision]"')
    from transformers import AutoImageProcessor

    name = os.fspath(name)
    with _one_line(name, what="image processor"):
        return AutoImageProcessor.from_pretrained(name, trust_remote_code=trust_remote_code)


def quantisation(kind: str, anatomy: Anatomy, dtype: torch.dtype | str = "auto") -> Any:
    """transformers' own quantisation config for `kind`, sparing everything outside the blocks.

    Raises:
        ValueError: an unknown kind, or layer widths that int4's groups do not divide.
        ImportError: the package is missing.
    """
    if kind not in QUANTISED:
        raise ValueError(f"--quantize {kind}: there is {', '.join(QUANTISED)}")
    package = PACKAGES[kind]
    if importlib.util.find_spec(package) is None:
        raise ImportError(
            f'--quantize {kind} needs {package}, which is not installed: pip install "deltaworks[quantize]"'
        )
    inside = {site.path for site in anatomy.select("all") if site.kind == "linear" and site.called}
    layers = {path: linear_shape(module) for path, module in base_modules(anatomy.model) if is_linear(module)}
    spared = [path for path in layers if path not in inside]
    if kind == "nf4":
        from transformers import BitsAndBytesConfig

        compute = dtype if isinstance(dtype, torch.dtype) else _config_dtype(anatomy.model)
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute,
            llm_int8_skip_modules=spared,  # its name notwithstanding, it holds for four bits too
        )
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup
    from transformers import TorchAoConfig

    if kind == "int8":
        return TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=spared)
    divisor = math.gcd(*(layers[path][1] for path in inside)) if inside else 128
    group = next((size for size in (128, 64, 32, 16) if divisor % size == 0), None)
    if group is None:
        raise ValueError(
            f"--quantize int4 needs layer widths that are multiples of 16, these share {divisor}; take int8"
        )
    scheme = IntxWeightOnlyConfig(
        weight_dtype=torch.int4,  # pyright: ignore[reportAttributeAccessIssue]
        granularity=PerGroup(group),
    )
    return TorchAoConfig(scheme, modules_to_not_convert=spared)


def _config_dtype(model: nn.Module) -> torch.dtype:
    told = getattr(getattr(model, "config", None), "dtype", None)
    return told if isinstance(told, torch.dtype) else torch.float32


def _auto(task: str) -> Any:
    import transformers

    return getattr(transformers, TASKS[task])


def _labels(task: str, num_labels: int | None, id2label: Mapping[int, str] | None) -> dict[str, Any]:
    if task not in TASKS:
        raise ValueError(f"task {task!r} is unknown; there is {', '.join(TASKS)}")
    made: dict[str, Any] = {}
    if task == "regression":
        made = {"num_labels": num_labels or 1, "problem_type": "regression"}
    elif num_labels is not None:
        made["num_labels"] = num_labels
    if id2label is not None:
        if num_labels is not None and num_labels != len(id2label):
            raise ValueError(f"num_labels is {num_labels} but id2label names {len(id2label)} labels")
        made |= {"id2label": dict(id2label), "label2id": {label: index for index, label in id2label.items()}}
        made["num_labels"] = len(id2label)
    return made


def as_dtype(dtype: str | torch.dtype | None) -> torch.dtype | str:
    """A dtype by name, "auto" for that of the checkpoint.

    Raises:
        ValueError: when there is no such floating point dtype.
    """
    if dtype is None or dtype == "auto":
        return "auto"
    short = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "half": "float16"}
    found = dtype if isinstance(dtype, torch.dtype) else getattr(torch, short.get(dtype, dtype), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype {dtype!r} is unknown; there is float32, bfloat16, float16")
    return found


class _one_line:
    """Turns what loading can fail with into one line that says what is wrong with `name`."""

    def __init__(self, name: str, task: str = "", quantize: str | None = None, what: str = "model") -> None:
        self.name, self.task, self.quantize, self.what = name, task, quantize, what

    def __enter__(self) -> None:
        place = Path(self.name)
        looks_local = place.is_absolute() or self.name.startswith((".", "~")) or self.name.count("/") > 1
        if not place.exists() and looks_local:
            raise OSError(f"{self.name}: there is no such folder")
        if place.is_file():
            raise OSError(f"{self.name} is a file; give the folder that holds config.json and the weights")
        if place.is_dir() and self.what == "model" and not (place / "config.json").is_file():
            if {"adapter_config.json", "adapter.json"} & {item.name for item in place.iterdir()}:
                raise OSError(f"{self.name} is an adapter, no base; give the model it was trained on")
            raise OSError(f"{self.name} is no model: it holds no config.json")
        files = {
            "tokenizer": ("token", "vocab", "spiece", "sentencepiece"),
            "image processor": ("preproc", "processor"),
        }
        wanted = files.get(self.what)
        if wanted and place.is_dir() and not any(item.name.startswith(wanted) for item in place.iterdir()):
            raise OSError(f"{self.name} holds no {self.what}")

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if not isinstance(error, Exception):
            return
        text = _first_line(error)
        local = Path(self.name).is_dir()
        if not local and isinstance(error, OSError):
            offline = os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0") or "connect" in text.lower()
            where = "the Hugging Face Hub cannot be reached" if offline else "the Hugging Face Hub has no such name"
            raise OSError(
                f"no {self.what} {self.name!r}: it is no folder here, and {where} (offline, give a folder)"
                if offline else f"no {self.what} {self.name!r}: it is no folder here, and {where}, or it is private"
            ) from error  # fmt: skip
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"{self.name} brings its own code; allow it with trust_remote_code if you trust it"
            ) from error
        if "Unrecognized configuration class" in str(error):
            config = _between(str(error), "configuration class <class '", "'>").rpartition(".")[2]
            raise ValueError(
                f"{self.name} ({config}) has no form for the task {self.task!r} in transformers"
            ) from error
        if self.quantize is not None and not isinstance(error, OSError):
            raise ValueError(f"{self.name} cannot be loaded as {self.quantize} on this device: {text}") from error
        if self.what != "model":
            raise OSError(f"{self.name} has no usable {self.what}: {text}") from error
        raise OSError(f"{self.name} cannot be loaded, its files may be damaged: {text}") from error


def _first_line(error: BaseException) -> str:
    lines: Iterable[str] = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)


def _between(text: str, start: str, end: str) -> str:
    return text.partition(start)[2].partition(end)[0]
