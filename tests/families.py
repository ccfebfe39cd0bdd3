"""Tiny, randomly initialised models of every family the library promises to know, with a batch for each.

`FAMILIES[name]()` returns `(model, batch)`: a model in eval mode (two blocks, width 32, a vocabulary of 64) and the
keyword arguments of one forward pass, labels included wherever the class computes a loss. Building is deterministic:
the same name gives the same weights and the same batch, and leaves the global random state as it found it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn import functional as F

Made = tuple[nn.Module, dict[str, Any]]
FAMILIES: dict[str, Callable[[], Made]] = {}

WIDTH, INNER, HEADS, KV_HEADS, LAYERS, VOCABULARY, POSITIONS = 32, 48, 4, 2, 2, 64, 64
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DECODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": POSITIONS,
    **SPECIAL,
}
ENCODER: dict[str, Any] = {key: value for key, value in DECODER.items() if key != "num_key_value_heads"}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def family(build: Callable[[], Made]) -> Callable[[], Made]:
    """Register `build` under its own name; the wrapper fixes the seed and puts the model in eval mode."""

    @wraps(build)
    def made() -> Made:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model, batch = build()
            _perturb(model)
        return model.eval(), batch

    FAMILIES[build.__name__] = made
    return made


@torch.no_grad()
def _perturb(model: nn.Module) -> None:
    # Fresh biases are zeros, fresh norm weights ones, and fresh matrices so small that attention is uniform: a fault
    # in a bias, a norm or a query would not show in the output.
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
        elif 0 < (spread := parameter.std(correction=0).item()) < 0.15:
            parameter.mul_(0.15 / spread)


def tokens(rows: int = 2, columns: int = 9) -> Tensor:
    """Token ids (`rows x columns`) from 5 up, so that no special token is among them."""
    return torch.randint(5, VOCABULARY, (rows, columns), generator=torch.Generator().manual_seed(1))


def _text(padded: bool = True, **labels: Tensor) -> dict[str, Any]:
    ids = tokens()
    mask = torch.ones_like(ids)
    if padded:
        ids[1, -3:], mask[1, -3:] = SPECIAL["pad_token_id"], 0
    return {"input_ids": ids, "attention_mask": mask, **labels}


def _language() -> dict[str, Any]:
    batch = _text()
    return batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


def _pixels() -> Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


# Decoders.


@family
def llama() -> Made:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER)), _language()


@family
def mistral() -> Made:
    return hf.MistralForCausalLM(hf.MistralConfig(**DECODER, head_dim=8, sliding_window=None)), _language()


@family
def qwen2() -> Made:
    return hf.Qwen2ForCausalLM(hf.Qwen2Config(**DECODER, tie_word_embeddings=True)), _language()


@family
def qwen3() -> Made:
    # head_dim differs from width / heads on purpose: the query projection is then not square.
    return hf.Qwen3ForCausalLM(hf.Qwen3Config(**DECODER, head_dim=16)), _language()


@family
def gemma3() -> Made:
    config = hf.Gemma3TextConfig(**DECODER, head_dim=16, query_pre_attn_scalar=16, sliding_window=4)
    return hf.Gemma3ForCausalLM(config), _language()


@family
def phi3() -> Made:
    return hf.Phi3ForCausalLM(hf.Phi3Config(**DECODER)), _language()


@family
def gpt2() -> Made:
    config = hf.GPT2Config(
        vocab_size=VOCABULARY, n_positions=POSITIONS, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **SPECIAL,
    )  # fmt: skip
    return hf.GPT2LMHeadModel(config), _language()


@family
def gpt_neox() -> Made:
    return hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**ENCODER)), _language()


@family
def opt() -> Made:
    config = hf.OPTConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, ffn_dim=INNER, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        max_position_embeddings=POSITIONS, word_embed_proj_dim=WIDTH, dropout=0.0, **SPECIAL,
    )  # fmt: skip
    return hf.OPTForCausalLM(config), _language()


FALCON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "ffn_hidden_size": INNER,
    **SPECIAL,
}


@family
def falcon() -> Made:
    config = hf.FalconConfig(**FALCON, multi_query=True, new_decoder_architecture=False, parallel_attn=True)
    return hf.FalconForCausalLM(config), _language()


@family
def falcon_new() -> Made:
    config = hf.FalconConfig(**FALCON, num_kv_heads=KV_HEADS, new_decoder_architecture=True, bias=True)
    return hf.FalconForCausalLM(config), _language()


@family
def falcon_rw() -> Made:
    config = hf.FalconConfig(
        **FALCON, multi_query=False, new_decoder_architecture=False, parallel_attn=False, alibi=True, bias=True
    )
    return hf.FalconForCausalLM(config), _language()


@family
def bloom() -> Made:
    config = hf.BloomConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, n_layer=LAYERS, n_head=HEADS,
        hidden_dropout=0.0, attention_dropout=0.0, **SPECIAL,
    )  # fmt: skip
    return hf.BloomForCausalLM(config), _language()


# Mixtures of experts.


@family
def mixtral() -> Made:
    config = hf.MixtralConfig(**DECODER, num_local_experts=4, num_experts_per_tok=2, sliding_window=None)
    return hf.MixtralForCausalLM(config), _language()


@family
def olmoe() -> Made:
    return hf.OlmoeForCausalLM(hf.OlmoeConfig(**DECODER, num_experts=4, num_experts_per_tok=2)), _language()


@family
def qwen3_moe() -> Made:
    config = hf.Qwen3MoeConfig(
        **DECODER, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, mlp_only_layers=[0]
    )
    return hf.Qwen3MoeForCausalLM(config), _language()


# Encoders.


@family
def bert() -> Made:
    return hf.BertForMaskedLM(hf.BertConfig(**ENCODER, **NO_DROPOUT)), _language()


@family
def roberta() -> Made:
    return hf.RobertaForMaskedLM(hf.RobertaConfig(**ENCODER, **NO_DROPOUT)), _language()


@family
def deberta_v2() -> Made:
    config = hf.DebertaV2Config(
        **ENCODER, **NO_DROPOUT, relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8,
        share_att_key=True, norm_rel_ebd="layer_norm", type_vocab_size=0, pooler_hidden_size=WIDTH,
    )  # fmt: skip
    return hf.DebertaV2ForMaskedLM(config), _language()


@family
def modernbert() -> Made:
    config = hf.ModernBertConfig(
        **ENCODER, local_attention=8, global_attn_every_n_layers=2, attention_dropout=0.0, cls_token_id=1,
        sep_token_id=2,
    )  # fmt: skip
    return hf.ModernBertForMaskedLM(config), _language()


# Encoder-decoders.


@family
def t5() -> Made:
    config = hf.T5Config(
        vocab_size=VOCABULARY, d_model=WIDTH, d_kv=8, d_ff=INNER, num_layers=LAYERS, num_heads=HEADS, dropout_rate=0.0,
        feed_forward_proj="gated-gelu", pad_token_id=0, eos_token_id=2, decoder_start_token_id=0,
    )  # fmt: skip
    return hf.T5ForConditionalGeneration(config), _text(labels=tokens(2, 5))


@family
def bart() -> Made:
    config = hf.BartConfig(
        vocab_size=VOCABULARY, d_model=WIDTH, encoder_layers=LAYERS, decoder_layers=LAYERS, encoder_ffn_dim=INNER,
        decoder_ffn_dim=INNER, encoder_attention_heads=HEADS, decoder_attention_heads=HEADS,
        max_position_embeddings=POSITIONS, dropout=0.0, decoder_start_token_id=2, forced_eos_token_id=None, **SPECIAL,
    )  # fmt: skip
    return hf.BartForConditionalGeneration(config), _text(labels=tokens(2, 5))


@family
def whisper() -> Made:
    config = hf.WhisperConfig(
        vocab_size=VOCABULARY, num_mel_bins=8, d_model=WIDTH, encoder_layers=LAYERS, decoder_layers=LAYERS,
        encoder_ffn_dim=INNER, decoder_ffn_dim=INNER, encoder_attention_heads=HEADS, decoder_attention_heads=HEADS,
        max_source_positions=12, max_target_positions=POSITIONS, dropout=0.0, decoder_start_token_id=1,
        suppress_tokens=None, begin_suppress_tokens=None, **SPECIAL,
    )  # fmt: skip
    sound = torch.randn(2, 8, 24, generator=torch.Generator().manual_seed(1))
    return hf.WhisperForConditionalGeneration(config), {"input_features": sound, "labels": tokens(2, 5)}


# Vision, and vision with text.


@family
def vit() -> Made:
    config = hf.ViTConfig(
        hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=LAYERS, num_attention_heads=HEADS, image_size=16,
        patch_size=4, num_labels=3, **NO_DROPOUT,
    )  # fmt: skip
    return hf.ViTForImageClassification(config), {"pixel_values": _pixels(), "labels": torch.tensor([0, 2])}


@family
def clip() -> Made:
    shape = {
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "projection_dim": 16,
    }
    text = shape | {"vocab_size": VOCABULARY, "max_position_embeddings": POSITIONS} | SPECIAL
    vision = shape | {"image_size": 16, "patch_size": 4}
    model = hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    return model, _text(padded=False) | {"pixel_values": _pixels(), "return_loss": True}


# State spaces.


@family
def mamba() -> Made:
    config = hf.MambaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=LAYERS, state_size=8, time_step_rank=4, **SPECIAL
    )
    return hf.MambaForCausalLM(config), {"input_ids": tokens(), "labels": tokens()}


# Heads of other kinds.


@family
def bert_classification() -> Made:
    config = hf.BertConfig(**ENCODER, **NO_DROPOUT, num_labels=3)
    return hf.BertForSequenceClassification(config), _text(labels=torch.tensor([0, 2]))


@family
def llama_classification() -> Made:
    config = hf.LlamaConfig(**DECODER, num_labels=3)
    return hf.LlamaForSequenceClassification(config), _text(labels=torch.tensor([0, 2]))


@family
def bert_tokens() -> Made:
    config = hf.BertConfig(**ENCODER, **NO_DROPOUT, num_labels=3)
    return hf.BertForTokenClassification(config), _text(labels=tokens() % 3)


# Modules that are nobody's family: called as `model(x, labels)` and returning an object with `loss` and `logits`.


class Output(dict):
    """Loss and logits, as attributes and as keys, as transformers' outputs have them."""

    __getattr__ = dict.__getitem__


class Mlp(nn.Module):
    """Three linear layers with GELU between them; features `batch x 32` to logits `batch x 3`."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, INNER)
        self.second = nn.Linear(INNER, WIDTH)
        self.last = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Output:
        logits = self.last(F.gelu(self.second(F.gelu(self.first(x)))))
        return Output(loss=None if labels is None else F.cross_entropy(logits, labels), logits=logits)


class ConvBlock(nn.Module):
    """A residual pair of 3 x 3 convolutions with a 1 x 1 linear mixing layer."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, groups=2)
        self.mix = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.conv2(F.relu(self.norm(self.conv1(x))))
        return x + self.mix(inner.movedim(1, -1)).movedim(-1, 1)


class Cnn(nn.Module):
    """A stem, two residual blocks, mean pooling and a classifier; images `batch x 3 x 16 x 16` to `batch x 3`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.stages = nn.Sequential(ConvBlock(8), ConvBlock(8))
        self.classifier = nn.Linear(8, 3)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Output:
        logits = self.classifier(self.stages(self.stem(x)).mean((2, 3)))
        return Output(loss=None if labels is None else F.cross_entropy(logits, labels), logits=logits)


@family
def mlp() -> Made:
    features = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(1))
    return Mlp(), {"x": features, "labels": torch.tensor([0, 1, 2, 1])}


@family
def cnn() -> Made:
    return Cnn(), {"x": _pixels(), "labels": torch.tensor([0, 2])}
