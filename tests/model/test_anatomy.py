"""What `describe` says of each family, against what the family's forward pass does."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from deltaworks.model import evidence
from deltaworks.model.anatomy import Anatomy, Block, describe
from deltaworks.model.trace import Trace
from tests.families import FAMILIES, HEADS, KV_HEADS, WIDTH

LLAMA = {
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.o_proj",
}
GATED = {"mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj", "mlp.down": "mlp.down_proj"}
BART = {
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.out_proj",
}
FLAT = {"mlp.up": "fc1", "mlp.down": "fc2"}
CROSS = {
    "cross_attention.query": "encoder_attn.q_proj",
    "cross_attention.key": "encoder_attn.k_proj",
    "cross_attention.value": "encoder_attn.v_proj",
    "cross_attention.output": "encoder_attn.out_proj",
}
MEGATRON = {
    "attention.qkv": "self_attention.query_key_value",
    "attention.output": "self_attention.dense",
    "mlp.up": "mlp.dense_h_to_4h",
    "mlp.down": "mlp.dense_4h_to_h",
}
EXPERTS = {"expert.gate_up": "mlp.experts.gate_up_proj", "expert.down": "mlp.experts.down_proj", "router": "mlp.gate"}
BERT = {
    "attention.query": "attention.self.query",
    "attention.key": "attention.self.key",
    "attention.value": "attention.self.value",
    "attention.output": "attention.output.dense",
    "mlp.up": "intermediate.dense",
    "mlp.down": "output.dense",
}
CLIP = BART | {"mlp.up": "mlp.fc1", "mlp.down": "mlp.fc2"}

# Role -> layer in the last block, for the layers that are linear maps.
LAYERS: dict[str, dict[str, str]] = {
    "llama": LLAMA | GATED,
    "mistral": LLAMA | GATED,
    "qwen2": LLAMA | GATED,
    "qwen3": LLAMA | GATED,
    "gemma3": LLAMA | GATED,
    "phi3": {
        "attention.qkv": "self_attn.qkv_proj",
        "attention.output": "self_attn.o_proj",
        "mlp.gate_up": "mlp.gate_up_proj",
        "mlp.down": "mlp.down_proj",
    },
    "gpt2": {
        "attention.qkv": "attn.c_attn",
        "attention.output": "attn.c_proj",
        "mlp.up": "mlp.c_fc",
        "mlp.down": "mlp.c_proj",
    },
    "gpt_neox": {role: name.replace("self_attention", "attention") for role, name in MEGATRON.items()},
    "opt": BART | FLAT,
    "falcon": MEGATRON,
    "falcon_new": MEGATRON,
    "falcon_rw": MEGATRON,
    "bloom": MEGATRON,
    "mixtral": LLAMA | EXPERTS,
    "olmoe": LLAMA | EXPERTS,
    "qwen3_moe": LLAMA | EXPERTS,
    "bert": BERT,
    "roberta": BERT,
    "deberta_v2": BERT | {f"attention.{p}": f"attention.self.{p}_proj" for p in ("query", "key", "value")},
    "modernbert": {
        "attention.qkv": "attn.Wqkv",
        "attention.output": "attn.Wo",
        "mlp.gate_up": "mlp.Wi",
        "mlp.down": "mlp.Wo",
    },
    "t5": {f"attention.{role}": f"layer.0.SelfAttention.{role[0]}" for role in ("query", "key", "value", "output")}
    | {f"cross_attention.{r}": f"layer.1.EncDecAttention.{r[0]}" for r in ("query", "key", "value", "output")}
    | {"mlp.gate": "layer.2.DenseReluDense.wi_0", "mlp.up": "layer.2.DenseReluDense.wi_1"}
    | {"mlp.down": "layer.2.DenseReluDense.wo"},
    "bart": BART | FLAT | CROSS,
    "whisper": BART | FLAT | CROSS,
    "vit": {f"attention.{role}": f"attention.{role[0]}_proj" for role in ("query", "key", "value", "output")}
    | {"mlp.up": "mlp.fc1", "mlp.down": "mlp.fc2"},
    "clip": CLIP,
    "mamba": {f"ssm.{role}": f"mixer.{role}_proj" for role in ("in", "x", "dt", "out")},
    "bert_classification": BERT,
    "llama_classification": LLAMA | GATED,
    "bert_tokens": BERT,
}
TRANSFORMERS = [name for name in FAMILIES if name not in ("mlp", "cnn", "mamba")]


@functools.cache
def built(name: str) -> tuple[nn.Module, dict[str, Any]]:
    return FAMILIES[name]()


def described(name: str) -> Anatomy:
    return describe(built(name)[0])


def layers_of(anatomy: Anatomy, block: int) -> dict[str, str]:
    found = {}
    for site in anatomy.sites:
        linear = site.kind in ("linear", "experts") or site.role == "router"
        if linear and site.role and site.block == block and site.part is None:
            found[site.role] = site.name.removeprefix(anatomy.blocks[block].path + ".")
    return found


@pytest.mark.parametrize("name", LAYERS)
def test_every_linear_map_of_a_block_has_its_role(name: str) -> None:
    anatomy = described(name)
    assert anatomy.unseen is None
    assert layers_of(anatomy, len(anatomy.blocks) - 1) == LAYERS[name]


@pytest.mark.parametrize("name", LAYERS)
def test_weights_have_their_roles_without_a_forward_pass(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = described(name)
    monkeypatch.setattr(evidence, "trace", lambda model: Trace(error="not today"))
    unseen = describe(FAMILIES[name]()[0])
    assert unseen.unseen == "not today"
    for block in range(len(seen.blocks)):
        assert layers_of(unseen, block) == layers_of(seen, block)
    for told, guessed in zip(seen.blocks, unseen.blocks, strict=True):
        for place in ("attention", "cross_attention", "mlp_in", "ssm", "experts", "router", "hidden_size", "num_heads"):
            assert getattr(guessed, place) == getattr(told, place), place


class Recorder:
    """First input and first output tensor of modules, as they were in the one call of a forward pass."""

    def __init__(self, model: nn.Module, paths: list[str]) -> None:
        self.input: dict[str, Tensor] = {}
        self.output: dict[str, Tensor] = {}
        self.hooks = [
            model.get_submodule(path).register_forward_hook(self._record(path), with_kwargs=True) for path in paths
        ]

    def _record(self, path: str) -> Any:
        def record(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            given = args[0] if args else kwargs["hidden_states"]
            self.input[path] = given.detach().clone()
            self.output[path] = (output if isinstance(output, Tensor) else output[0]).detach().clone()

        return record


def sublayer_outputs(block: Block) -> list[str]:
    return [path for path in (block.attention_out, block.cross_attention_out, block.mlp_out) if path is not None]


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_sublayer_outputs_are_what_the_residual_stream_receives(name: str) -> None:
    residual_equation_holds(*built(name))


@torch.no_grad()
def residual_equation_holds(model: nn.Module, batch: dict[str, Any]) -> None:
    """Pre-norm: y = x + a + m. Post-norm: y = norm(h + m) with h = norm(x + a). With cross-attention in between."""
    anatomy = describe(model)
    watched = [path for block in anatomy.blocks for path in [block.path, *sublayer_outputs(block)]]
    recorder = Recorder(model, watched)
    model(**batch)
    for block in anatomy.blocks:
        stream = recorder.input[block.path]
        norms = (block.attention_norm, block.cross_attention_norm, block.mlp_norm)
        parts = (block.attention_out, block.cross_attention_out, block.mlp_out)
        for norm, part in zip(norms, parts, strict=True):
            if part is None:
                continue
            stream = stream + recorder.output[part].reshape(stream.shape)  # OPT's last layers see rows of tokens
            if not block.pre_norm and norm != part:
                assert norm is not None
                stream = model.get_submodule(norm)(stream)
        torch.testing.assert_close(stream, recorder.output[block.path], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", TRANSFORMERS)
@torch.no_grad()
def test_the_feed_forward_input_goes_into_its_first_layer(name: str) -> None:
    model, batch = built(name)
    anatomy = describe(model)
    for block in anatomy.blocks:
        assert block.mlp_in is not None
        firsts = [
            site.path for site in anatomy.sites
            if site.block == block.index and site.role in ("mlp.up", "mlp.gate_up", "expert.gate_up") and not site.part
        ]  # fmt: skip
        recorder = Recorder(model, [block.mlp_in, firsts[0]])
        model(**batch)
        width = recorder.input[block.mlp_in].shape[-1]
        torch.testing.assert_close(
            recorder.input[block.mlp_in].reshape(-1, width), recorder.input[firsts[0]].reshape(-1, width)
        )


@pytest.mark.parametrize("name", TRANSFORMERS)
@torch.no_grad()
def test_pre_norms_feed_their_sublayers(name: str) -> None:
    model, batch = built(name)
    for block in describe(model).blocks:
        if not block.pre_norm or block.mlp_norm is None:
            continue
        assert block.mlp_in is not None
        recorder = Recorder(model, [block.mlp_norm, block.mlp_in])
        model(**batch)
        torch.testing.assert_close(recorder.output[block.mlp_norm], recorder.input[block.mlp_in])


def test_post_norm_and_pre_norm_are_told_apart_where_the_modules_are_the_same() -> None:
    assert not described("bart").blocks[0].pre_norm
    assert described("whisper").blocks[0].pre_norm
    assert not described("bert").blocks[0].pre_norm
    assert described("opt").blocks[0].pre_norm


def test_norms_around_a_sublayer_are_told_from_norms_before_it() -> None:
    block = described("gemma3").blocks[0]
    assert block.attention_norm == "model.layers.0.input_layernorm"
    assert block.attention_post_norm == "model.layers.0.post_attention_layernorm"
    assert block.mlp_norm == "model.layers.0.pre_feedforward_layernorm"
    assert block.mlp_out == block.mlp_post_norm == "model.layers.0.post_feedforward_layernorm"
    assert described("llama").blocks[0].mlp_norm == "model.layers.0.post_attention_layernorm"


def test_parallel_blocks_are_seen() -> None:
    parallel = {name for name in TRANSFORMERS if described(name).blocks[0].parallel}
    assert parallel == {"gpt_neox", "falcon", "falcon_new"}


@pytest.mark.parametrize("name", [n for n in TRANSFORMERS if n not in ("vit", "clip", "whisper", "t5", "bart")])
@torch.no_grad()
def test_causality_is_what_the_last_token_does_to_the_first_logits(name: str) -> None:
    model, _ = built(name)
    anatomy = describe(model)
    ids = torch.randint(5, 64, (1, 7), generator=torch.Generator().manual_seed(3))
    other = ids.clone()
    other[0, -1] = 5 + (other[0, -1] - 4) % 50
    first = Recorder(model, [anatomy.blocks[-1].path])
    model(input_ids=ids)
    before = first.output[anatomy.blocks[-1].path][0, 0]
    model(input_ids=other)
    unchanged = torch.allclose(before, first.output[anatomy.blocks[-1].path][0, 0], atol=1e-6)
    assert anatomy.causal == anatomy.stacks[-1].causal == unchanged


def test_causality_may_come_from_outside_the_attention() -> None:
    text, vision = described("clip").stacks
    assert (text.name, text.causal, vision.name, vision.causal) == ("text", True, "vision", False)


@pytest.mark.parametrize("name", TRANSFORMERS)
@torch.no_grad()
def test_the_attention_interface_is_used_where_it_is_said_to_be(name: str) -> None:
    model, batch = FAMILIES[name]()
    blocks = describe(model).blocks
    callers: set[nn.Module] = set()

    def listening(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        callers.add(module)
        return sdpa_attention_forward(module, *args, **kwargs)

    AttentionInterface.register("listening", listening)
    AttentionMaskInterface.register("listening", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    supported = {block.supports_attention_interface for block in blocks}
    if supported == {False}:
        assert name in {"falcon", "falcon_new", "falcon_rw", "bloom", "deberta_v2"}
        return
    model.set_attn_implementation("listening")
    model(**batch)
    wanted = {model.get_submodule(path) for b in blocks for path in (b.attention, b.cross_attention) if path}
    assert callers == wanted


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_head_counts_are_the_configuration_s(name: str) -> None:
    grouped = {"llama", "mistral", "qwen2", "qwen3", "gemma3", "phi3", "mixtral", "olmoe", "qwen3_moe", "falcon_new"}
    kv_heads = KV_HEADS if name in grouped | {"llama_classification"} else 1 if name == "falcon" else HEADS
    head_dim = 16 if name in ("qwen3", "gemma3", "qwen3_moe") else WIDTH // HEADS
    anatomy = described(name)
    for block in anatomy.blocks:
        assert (block.num_heads, block.num_kv_heads, block.head_dim) == (HEADS, kv_heads, head_dim)
        assert block.hidden_size == anatomy.hidden_size == WIDTH


ENDS = {
    # family: embedding, position, head, head_new, final norms
    "llama": ("model.embed_tokens", None, "lm_head", [], ["model.norm"]),
    "gpt2": ("transformer.wte", "transformer.wpe", "lm_head", [], ["transformer.ln_f"]),
    "opt": (
        "model.decoder.embed_tokens",
        "model.decoder.embed_positions",
        "lm_head",
        [],
        ["model.decoder.final_layer_norm"],
    ),
    "bert": (
        "bert.embeddings.word_embeddings",
        "bert.embeddings.position_embeddings",
        "cls.predictions.decoder",
        [],
        [],
    ),
    "bert_classification": (
        "bert.embeddings.word_embeddings",
        "bert.embeddings.position_embeddings",
        "classifier",
        ["classifier"],
        [],
    ),
    "llama_classification": ("model.embed_tokens", None, "score", ["score"], ["model.norm"]),
    "modernbert": ("model.embeddings.tok_embeddings", None, "decoder", [], ["model.final_norm"]),
    "t5": ("encoder.embed_tokens", None, "lm_head", [], ["encoder.final_layer_norm", "decoder.final_layer_norm"]),
    "bart": ("model.encoder.embed_tokens", "model.encoder.embed_positions", "lm_head", [], []),
    "vit": (None, "vit.embeddings", "classifier", ["classifier"], ["vit.layernorm"]),
    "mamba": ("backbone.embeddings", None, "lm_head", [], ["backbone.norm_f"]),
    "cnn": (None, None, "classifier", ["classifier"], []),
    "mlp": (None, None, None, [], []),
}


@pytest.mark.parametrize("name", ENDS)
def test_what_lies_before_and_after_the_blocks(name: str) -> None:
    anatomy = described(name)
    found = (anatomy.embedding, anatomy.position, anatomy.head, anatomy.head_new, anatomy.final_norms)
    assert found == ENDS[name]


@pytest.mark.parametrize("name", FAMILIES)
def test_tied_is_whether_head_and_embedding_are_one_parameter(name: str) -> None:
    model, _ = FAMILIES[name]()
    anatomy = describe(model)
    getter = getattr(model, "get_output_embeddings", lambda: None)
    tied = getter() is not None and getter().weight is model.get_input_embeddings().weight
    assert anatomy.tied == tied


def test_stacks_have_their_own_entrances() -> None:
    encoder, decoder = described("whisper").stacks
    assert (encoder.name, encoder.embedding, encoder.causal) == ("encoder", "model.encoder.conv1", False)
    assert (decoder.name, decoder.embedding, decoder.causal) == ("decoder", "model.decoder.embed_tokens", True)
    assert described("whisper").is_encoder_decoder
    assert [stack.path for stack in described("t5").stacks] == ["encoder.block", "decoder.block"]


def test_mamba_s_weights_that_are_used_without_calling_their_layer_are_marked() -> None:
    uncalled = {site.path.rpartition(".")[2] for site in described("mamba").sites if not site.called}
    assert uncalled == {"conv1d", "dt_proj"}


@pytest.mark.parametrize("name", FAMILIES)
def test_describing_leaves_the_model_and_the_random_state_alone(name: str) -> None:
    model, _ = FAMILIES[name]()
    model.train()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    random = torch.get_rng_state()
    describe(model)
    assert torch.equal(random, torch.get_rng_state())
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_without_weights_is_described_the_same(name: str) -> None:
    model, _ = FAMILIES[name]()
    full = describe(model)
    empty = describe(model.to("meta"))
    assert (full.sites, full.blocks, full.stacks) == (empty.sites, empty.blocks, empty.stacks)


def test_a_description_is_kept_until_the_modules_change() -> None:
    model, _ = FAMILIES["llama"]()
    assert describe(model).sites is describe(model).sites
    model.lm_head = nn.Linear(WIDTH, 7)
    assert describe(model).model.get_submodule("lm_head").out_features == 7


SHAPE = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
GROUPED = SHAPE | {"intermediate_size": 48, "num_key_value_heads": 2}
GPT = {"vocab_size": 64, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
# Families that nobody promised: their roles must come out all the same, as they would for next year's models.
OTHERS: dict[str, Callable[[], nn.Module]] = {
    "distilbert": lambda: hf.DistilBertForMaskedLM(
        hf.DistilBertConfig(vocab_size=64, dim=32, hidden_dim=48, n_layers=2, n_heads=4)
    ),
    "albert": lambda: hf.AlbertForMaskedLM(hf.AlbertConfig(**SHAPE, intermediate_size=48, embedding_size=16)),
    "gptj": lambda: hf.GPTJForCausalLM(hf.GPTJConfig(**GPT, rotary_dim=4)),
    "codegen": lambda: hf.CodeGenForCausalLM(hf.CodeGenConfig(**GPT, n_ctx=64, rotary_dim=4)),
    "mpt": lambda: hf.MptForCausalLM(hf.MptConfig(d_model=32, n_heads=4, n_layers=2, expansion_ratio=2, vocab_size=64)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**GROUPED, head_dim=8)),
    "olmo2": lambda: hf.Olmo2ForCausalLM(hf.Olmo2Config(**GROUPED)),
    "cohere": lambda: hf.CohereForCausalLM(hf.CohereConfig(**GROUPED, bos_token_id=1, eos_token_id=2)),
    "glm4": lambda: hf.Glm4ForCausalLM(hf.Glm4Config(**GROUPED, head_dim=8)),
    "gpt_oss": lambda: hf.GptOssForCausalLM(
        hf.GptOssConfig(**GROUPED, head_dim=8, num_local_experts=4, num_experts_per_tok=2)
    ),
    "qwen2_moe": lambda: hf.Qwen2MoeForCausalLM(
        hf.Qwen2MoeConfig(
            **GROUPED,
            num_experts=4,
            moe_intermediate_size=24,
            shared_expert_intermediate_size=24,
            num_experts_per_tok=2,
        )
    ),
    "recurrent_gemma": lambda: hf.RecurrentGemmaForCausalLM(
        hf.RecurrentGemmaConfig(**GROUPED | {"num_hidden_layers": 3}, head_dim=8, lru_width=32, attention_window_size=8)
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_families_that_nobody_promised(name: str) -> None:
    torch.manual_seed(0)
    model = OTHERS[name]().eval()
    anatomy = describe(model)
    assert anatomy.unseen is None
    last = {site.role for site in anatomy.sites if site.block == len(anatomy.blocks) - 1}
    assert {"attention.query", "attention.key", "attention.value", "attention.output", "attention.norm"} <= last
    assert {"mlp.up", "mlp.down"} <= last or {"expert.up", "expert.down"} <= last
    if name == "recurrent_gemma":  # only every third of its blocks has an attention
        anatomy.blocks[:] = anatomy.blocks[2:]
    residual_equation_holds(model, {"input_ids": torch.randint(5, 64, (1, 7))})


def test_experts_that_are_modules_of_their_own() -> None:
    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(WIDTH, 3, bias=False)
            self.experts = nn.ModuleList(Gated() for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            share, chosen = self.gate(x).softmax(-1).max(-1)
            out = torch.zeros_like(x)
            for index, expert in enumerate(self.experts):
                rows = (chosen == index).nonzero(as_tuple=True)
                out[rows] += share[rows].unsqueeze(-1) * expert(x[rows])
            return out

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w1, self.w2, self.w3 = nn.Linear(WIDTH, 48), nn.Linear(48, WIDTH), nn.Linear(WIDTH, 48)

        def forward(self, x: Tensor) -> Tensor:
            return self.w2(nn.functional.silu(self.w1(x)) * self.w3(x))

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.moe = nn.LayerNorm(WIDTH), Mixture()

        def forward(self, x: Tensor) -> Tensor:
            return x + self.moe(self.norm(x))

    anatomy = describe(nn.Sequential(nn.Linear(8, WIDTH), nn.Sequential(Layer(), Layer())))
    assert anatomy.unseen is None
    roles = anatomy.roles()
    assert {role: roles[role] for role in ("expert.gate", "expert.up", "expert.down", "router")} == {
        "expert.gate": 6, "expert.up": 6, "expert.down": 6, "router": 2
    }  # fmt: skip
    block = anatomy.blocks[1]
    assert (block.experts, block.router, block.mlp_norm) == ("1.1.moe.experts", "1.1.moe.gate", "1.1.norm")
    assert next(s.path for s in anatomy.sites if s.role == "expert.gate") == "1.0.moe.experts.0.w1"


def test_torch_s_own_transformer_is_understood() -> None:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 48, batch_first=True)
    anatomy = describe(nn.TransformerEncoder(layer, 2))
    roles = {site.role: site.name for site in anatomy.sites if site.block == 1 and site.part is None and site.parameter}
    assert roles["attention.qkv"] == "layers.1.self_attn.in_proj_weight"
    assert roles["attention.output"] == "layers.1.self_attn.out_proj"
    assert (roles["mlp.up"], roles["mlp.down"]) == ("layers.1.linear1", "layers.1.linear2")
    part = next(site for site in anatomy.sites if site.part == "key")
    assert part.rows == tuple(range(WIDTH, 2 * WIDTH)) and not part.called


def test_a_model_that_cannot_be_run_is_described_all_the_same() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = FAMILIES["llama"]()[0].model

        def forward(self, first: Tensor, second: Tensor) -> Tensor:
            raise RuntimeError("only with both")

    anatomy = describe(Odd())
    assert anatomy.unseen is not None
    assert anatomy.roles()["attention.query"] == 2
    assert anatomy.blocks[0].attention_norm == "inner.layers.0.input_layernorm"
    assert anatomy.blocks[0].mlp_norm == "inner.layers.0.post_attention_layernorm"
    assert anatomy.blocks[0].pre_norm
