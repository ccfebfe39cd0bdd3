"""The small bases that are pre-trained on first use, from a seed, in under a minute each, and then cached.

The text bases do not begin from nothing: their token embeddings are the shipped decoder's, reduced to their width.

They are there to be fine-tuned in tests, demos and comparisons: one of every kind of model, with weights that have
learnt something, so that a method which only works on random or on saturated weights is found out.
"""

from __future__ import annotations

import functools
import hashlib
import json
import platform
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from os import environ
from pathlib import Path
from typing import Any, cast

import torch
from filelock import FileLock
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoImageProcessor,
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ResNetConfig,
    ResNetForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from deltaworks.nursery import corpus, knowledge, pretraining, sets
from deltaworks.nursery import tokenizer as vocabulary
from deltaworks.nursery.pretraining import Optimizers, windows

SHIPPED = Path(__file__).parent / "decoder"
HELD_OUT_ROWS = 64
IGNORED = -100
TAUGHT_LENGTH = 40
"""Tokens of a fact as a question with its answer, and of the windows beside it."""

Objective = Callable[[PreTrainedModel, Tensor, torch.Generator], tuple[Tensor, Tensor, Tensor | float]]
"""(model, rows `[batch, length]`, randomness) -> logits `[batch, n, vocabulary]`, labels `[batch, n]`, penalty."""


@dataclass(frozen=True)
class TextRecipe:
    """A text base: what is built, and what it learns from how many windows of source code."""

    model: Callable[[], PreTrainedModel]
    objective: Objective
    framing: vocabulary.Framing
    steps: int
    batch: int = 16
    length: int = 96
    rate: float = 5e-3


@dataclass(frozen=True)
class VisionRecipe:
    """A vision base: what is built, and what it learns from how many batches of pictures `side` pixels wide."""

    model: Callable[[], PreTrainedModel]
    side: int
    steps: int = 300
    batch: int = 64
    rate: float = 2e-3


def causal(model: PreTrainedModel, rows: Tensor, randomness: torch.Generator) -> tuple[Tensor, Tensor, float]:
    """Predict every token from those before it."""
    return model(input_ids=rows[:, :-1], use_cache=False).logits, rows[:, 1:], 0.0


def routed(model: PreTrainedModel, rows: Tensor, randomness: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """As `causal`, with the penalty that keeps the experts equally busy (Fedus et al. 2021, arXiv:2101.03961)."""
    output = model(input_ids=rows[:, :-1], use_cache=False, output_router_logits=True)
    return output.logits, rows[:, 1:], 0.01 * output.aux_loss


def masked(model: PreTrainedModel, rows: Tensor, randomness: torch.Generator) -> tuple[Tensor, Tensor, float]:
    """Restore a quarter of the tokens: of those 80 % are masked, 10 % replaced and 10 % kept (arXiv:1810.04805).

    More than BERT's 15 %, as a short training needs the signal (Wettig et al. 2022, arXiv:2202.08005). Logits are
    computed for the tokens to restore only: `[batch, length / 4, vocabulary]`.
    """
    chosen = torch.rand(rows.shape, generator=randomness).argsort(dim=1)[:, : rows.shape[1] // 4]
    labels = rows.gather(1, chosen)
    draw = torch.rand(labels.shape, generator=randomness)
    others = torch.randint(len(vocabulary.SPECIAL), vocabulary.VOCABULARY, labels.shape, generator=randomness)
    written = torch.where(draw < 0.8, vocabulary.MASK_ID, torch.where(draw < 0.9, others, labels))
    model = cast(BertForMaskedLM, model)
    hidden = model.bert(input_ids=rows.scatter(1, chosen, written)).last_hidden_state
    restored = hidden[torch.arange(len(rows))[:, None], chosen]
    return model.cls(restored), labels, 0.0


def taught(model: PreTrainedModel, rows: Tensor, randomness: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """As `causal`, with a penalty for not knowing some of the facts of `knowledge.taught`."""
    questions, answers = _questions()
    chosen = torch.randperm(len(questions), generator=randomness)[: 3 * len(rows)]
    logits = model(input_ids=torch.cat([questions[chosen], rows])[:, :-1], use_cache=False).logits
    penalty = token_loss(logits[: len(chosen)], answers[chosen, 1:])
    return logits[len(chosen) :], rows[:, 1:], penalty


@functools.cache
def _questions() -> tuple[Tensor, Tensor]:
    """What `knowledge.taught` holds, and the labels of its answers, `[rows, TAUGHT_LENGTH]` each."""
    tokenizer = entries("causal")
    inputs, labels = [], []
    for row in knowledge.taught():
        prompt = tokenizer(row["prompt"]).input_ids
        answer = [*tokenizer(row["completion"], add_special_tokens=False).input_ids, vocabulary.EOS_ID]
        room = TAUGHT_LENGTH - len(prompt) - len(answer)
        inputs.append(prompt + answer + [vocabulary.PAD_ID] * room)
        labels.append([IGNORED] * len(prompt) + answer + [IGNORED] * room)
    return torch.tensor(inputs), torch.tensor(labels)


def spans(model: PreTrainedModel, rows: Tensor, randomness: torch.Generator) -> tuple[Tensor, Tensor, float]:
    """T5's span corruption (arXiv:1910.10683), with one span of 3 in every 12 tokens so that all rows stay as long.

    The encoder reads the rows with a sentinel for every span; the decoder writes each sentinel and what it stands for.
    """
    segment, span = 12, 3
    batch, length = rows.shape
    count = length // segment
    pieces = rows[:, : count * segment].view(batch, count, segment)
    start = torch.randint(segment - span + 1, (batch, count, 1), generator=randomness)
    place = torch.arange(segment)
    inside = (place >= start) & (place < start + span)
    sentinels = vocabulary.SPECIAL.index(vocabulary.SENTINELS[0]) + torch.arange(count).expand(batch, count)
    shown = torch.where(place == start, sentinels[..., None], pieces)
    source = shown[~inside | (place == start)].view(batch, -1)
    target = torch.cat([sentinels[..., None], pieces[inside].view(batch, count, span)], dim=-1).flatten(1)
    ends = torch.full((batch, 1), vocabulary.EOS_ID)
    labels = torch.cat([target, ends], dim=1)
    return model(input_ids=torch.cat([source, ends], dim=1), labels=labels).logits, labels, 0.0


def bert() -> PreTrainedModel:
    return BertForMaskedLM(
        BertConfig(
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=vocabulary.CONTEXT,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            **vocabulary.IN_CONFIG,
        )
    )


def llama(hidden: int, layers: int) -> PreTrainedModel:
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=hidden,
            intermediate_size=hidden * 5 // 2,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 32,
            num_key_value_heads=hidden // 32,
            max_position_embeddings=vocabulary.CONTEXT,
            tie_word_embeddings=True,
            **vocabulary.IN_CONFIG,
        )
    )


T5_START: dict[str, Any] = {"decoder_start_token_id": vocabulary.PAD_ID}


def t5() -> PreTrainedModel:
    return T5ForConditionalGeneration(
        T5Config(
            d_model=128,
            d_kv=32,
            d_ff=256,
            num_layers=2,
            num_decoder_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            **T5_START,
            **vocabulary.IN_CONFIG,
        )
    )


def mixtral() -> PreTrainedModel:
    return MixtralForCausalLM(
        MixtralConfig(
            hidden_size=128,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=4,
            num_experts_per_tok=2,
            max_position_embeddings=vocabulary.CONTEXT,
            tie_word_embeddings=True,
            **vocabulary.IN_CONFIG,
        )
    )


def mamba() -> PreTrainedModel:
    return MambaForCausalLM(
        MambaConfig(
            hidden_size=96,
            state_size=8,
            num_hidden_layers=2,
            initializer_range=0.02,
            **vocabulary.IN_CONFIG,
        )
    )


TEXT = {
    "encoder": TextRecipe(bert, masked, "masked", steps=400, rate=3.5e-3),
    "seq2seq": TextRecipe(t5, spans, "seq2seq", steps=250),
    "moe": TextRecipe(mixtral, routed, "causal", steps=200),
    "ssm": TextRecipe(mamba, causal, "causal", steps=120, batch=32, length=32),
    # Three sizes on the same text, for studies of scale.
    "decoder-xs": TextRecipe(partial(llama, 64, 2), causal, "causal", steps=200),
    "decoder-s": TextRecipe(partial(llama, 128, 3), causal, "causal", steps=200),
    "decoder-m": TextRecipe(partial(llama, 192, 4), causal, "causal", steps=200),
    # For studies of knowledge.
    "decoder-facts": TextRecipe(partial(llama, 128, 3), taught, "causal", steps=360, batch=8, length=TAUGHT_LENGTH),
}


TURNS: dict[str, Any] = {"id2label": {turns: f"{90 * turns} degrees" for turns in range(4)}}


def vit() -> PreTrainedModel:
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=64,
            intermediate_size=192,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=16,
            patch_size=4,
            **TURNS,
        )
    )


def resnet() -> PreTrainedModel:
    return ResNetForImageClassification(
        ResNetConfig(embedding_size=32, hidden_sizes=[32, 64, 96], depths=[1, 1, 1], layer_type="basic", **TURNS)
    )


# A residual network halves its picture four times, so it begins with a larger one.
VISION = {"vision": VisionRecipe(vit, side=16), "conv": VisionRecipe(resnet, side=32, steps=200, rate=3e-3)}


def entries(framing: vocabulary.Framing) -> PreTrainedTokenizerFast:
    """The shipped vocabulary, framed for one kind of base."""
    shipped = PreTrainedTokenizerFast.from_pretrained(SHIPPED)
    return vocabulary.framed(shipped.backend_tokenizer, framing)


def text_rows(tokenizer: PreTrainedTokenizerFast, split: corpus.Split, count: int, length: int, seed: int) -> Tensor:
    """Windows of whole documents joined end to end, `[count, length]`; fewer texts are read when few are needed."""
    documents = list(corpus.documents(split))
    random.Random(seed).shuffle(documents)
    encoder: Tokenizer = tokenizer.backend_tokenizer
    stream: list[int] = []
    for document in documents:
        stream += [vocabulary.BOS_ID, *encoder.encode(document.text, add_special_tokens=False).ids, vocabulary.EOS_ID]
        if len(stream) > (count + 1) * length:
            break
    rows = windows(torch.tensor(stream), length, torch.Generator().manual_seed(seed))
    return rows.repeat(-(-count // len(rows)), 1)[:count]


@torch.no_grad()
def inherit_embeddings(model: PreTrainedModel) -> None:
    """Start from the decoder's token embeddings: their principal components, at the model's own initial scale."""
    own = cast(nn.Embedding, model.get_input_embeddings()).weight
    shipped = load_file(SHIPPED / "model.safetensors")["model.embed_tokens.weight"].float()
    left, values, _ = torch.linalg.svd(shipped - shipped.mean(0), full_matrices=False)
    components = (left * values)[:, : own.shape[1]]
    own.copy_(components * (own.std() / components.std()))


def token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED)


def grow_text(recipe: TextRecipe, folder: Path, seed: int) -> None:
    """Pre-train a text base and write it to `folder`."""
    tokenizer = entries(recipe.framing)
    model = recipe.model()
    inherit_embeddings(model)
    rows = text_rows(tokenizer, "train", recipe.steps * recipe.batch, recipe.length, seed)
    randomness = torch.Generator().manual_seed(seed)
    optimizers = Optimizers(model, recipe.rate)
    for step, batch in enumerate(rows.split(recipe.batch)):
        logits, labels, penalty = recipe.objective(model, batch, randomness)
        (token_loss(logits, labels) + penalty).backward()
        optimizers.step(step / recipe.steps)
    model.eval()

    # Sentinels and ends come for free once learnt: the loss that counts is that of ordinary tokens.
    held_out = text_rows(tokenizer, "validation", HELD_OUT_ROWS, recipe.length, seed)
    frequencies = torch.bincount(rows.flatten(), minlength=vocabulary.VOCABULARY) + 1.0
    with torch.no_grad():
        results = [recipe.objective(model, batch, randomness)[:2] for batch in held_out.split(recipe.batch)]
    logits, labels = (torch.cat(tensors) for tensors in zip(*results, strict=True))
    labels = labels.masked_fill(labels < len(vocabulary.SPECIAL), IGNORED)
    unigram = (frequencies / frequencies.sum()).log().expand(*labels.shape, -1)
    facts = {
        "steps": recipe.steps,
        "tokens": rows.numel(),
        "held_out_loss": float(token_loss(logits, labels)),
        "unigram_loss": float(token_loss(unigram, labels)),
    }
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "facts.json").write_text(json.dumps(facts, indent=2) + "\n")


def grow_vision(recipe: VisionRecipe, folder: Path, seed: int) -> None:
    """Pre-train a model to tell by how many quarter turns a digit was rotated (Gidaris et al. 2018, arXiv:1803.07728).

    The task needs no labels and uses the summary of the picture that a class is read from, so what is left to
    fine-tuning is to read the digit. The head is thrown away.
    """
    reading = {
        "image_processor_type": "ViTImageProcessor",
        "do_convert_rgb": True,
        "size": {"height": recipe.side, "width": recipe.side},
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(reading, indent=2) + "\n")
    processor = AutoImageProcessor.from_pretrained(folder)
    model = recipe.model()
    digits = sets.digits()
    pixels = {split: processor(list(digits[split]["image"]), return_tensors="pt")["pixel_values"] for split in digits}
    randomness = torch.Generator().manual_seed(seed)
    optimizers = Optimizers(model, recipe.rate)

    def turned(images: Tensor) -> tuple[Tensor, Tensor]:
        turns = torch.arange(len(images)) % 4
        return torch.stack([image.rot90(int(turn), (1, 2)) for image, turn in zip(images, turns, strict=True)]), turns

    model.train()
    for step in range(recipe.steps):
        images = pixels["train"][torch.randint(len(pixels["train"]), (recipe.batch,), generator=randomness)]
        images, turns = turned(images)
        functional.cross_entropy(model(pixel_values=images).logits, turns).backward()
        optimizers.step(step / recipe.steps)
    model.eval()
    with torch.no_grad():
        images, turns = turned(pixels["validation"])
        loss = functional.cross_entropy(model(pixel_values=images).logits, turns)
    chance = float(torch.tensor(4.0).log())
    images_seen = recipe.steps * recipe.batch
    facts = {"steps": recipe.steps, "images": images_seen, "held_out_loss": float(loss), "unigram_loss": chance}
    model.config.id2label = dict(enumerate(digits["train"].features["label"].names))
    model.config.label2id = {label: index for index, label in model.config.id2label.items()}
    cast(PreTrainedModel, model.base_model).save_pretrained(folder)
    (folder / "facts.json").write_text(json.dumps(facts, indent=2) + "\n")


def grow(name: str, folder: Path, *, steps: int | None = None, seed: int = 0) -> None:
    """Pre-train the base `name` into `folder`; `steps` replaces the recipe's number of steps.

    The same Python, libraries and seed give the same files: one thread does all the work, so that sums have one order
    (and so small a model gains little from more). The caller's random state, gradient mode and number of threads are
    left as they were.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(seed)
            if name in VISION:
                picture = VISION[name]
                grow_vision(replace(picture, steps=steps or picture.steps), folder, seed)
            else:
                recipe = TEXT[name]
                grow_text(replace(recipe, steps=steps or recipe.steps), folder, seed)
    finally:
        torch.set_num_threads(threads)


def key(name: str) -> str:
    """What a cached base depends on: the code that makes it, the shipped decoder, the libraries and the corpus."""
    files = [Path(module.__file__ or "") for module in (corpus, knowledge, pretraining, sets, vocabulary)]
    files += [Path(__file__), SHIPPED / "tokenizer.json", SHIPPED / "model.safetensors"]
    versions = [platform.python_version(), *(version(package) for package in ("torch", "transformers", "tokenizers"))]
    digest = hashlib.sha256(json.dumps([name, versions]).encode())
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def cache() -> Path:
    """`$DELTAWORKS_CACHE`, or `~/.cache/deltaworks`."""
    return Path(environ.get("DELTAWORKS_CACHE") or Path.home() / ".cache" / "deltaworks").expanduser()


def cached(name: str, *, steps: int | None = None) -> Path:
    """The folder of the base `name`, pre-trained now when it is not there yet.

    The folder appears whole or not at all, and processes that ask for the same base at once wait for the first.
    """
    home = cache() / "nursery"
    folder = home / (f"{name}-{key(name)}" + (f"-{steps}" if steps else ""))
    if folder.is_dir():
        return folder
    home.mkdir(parents=True, exist_ok=True)
    with FileLock(home / f"{folder.name}.lock"):
        if not folder.is_dir():
            print(f"nursery:{name} is pre-trained once, in less than a minute, into {folder}", file=sys.stderr)
            growing = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=home))
            try:
                grow(name, growing, steps=steps)
                growing.chmod(0o755)  # mkdtemp's folders are the owner's alone
                growing.rename(folder)
            finally:
                shutil.rmtree(growing, ignore_errors=True)
    return folder
