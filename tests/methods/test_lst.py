"""Ladder side-tuning."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import deltaworks as dw
from deltaworks.core.operators.ladder import Ladder, Rung
from tests.families import DECODER, FAMILIES, tokens


def adapted(family: str, **settings: Any) -> tuple[nn.Module, dict[str, Any], dw.Tuned]:
    model, batch = FAMILIES[family]()
    return model, batch, dw.attach(model, dw.LST(**settings), seed=0)


def ladders(tuned: dw.Tuned) -> list[Ladder]:
    return [part for part in tuned.parts() if isinstance(part, Ladder)]


def wide(layers: int = 4) -> nn.Module:
    """A decoder large enough for widths to be divided by 4 exactly."""
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": layers, "num_key_value_heads": 4}
    return hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER | shape)).eval()


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_nothing_is_backpropagated_through_the_base(family: str) -> None:
    model, batch, tuned = adapted(family)
    model.train()
    seen: list[bool] = []
    for block in dw.core.attach.describe(model).blocks:
        model.get_submodule(block.path).register_forward_hook(
            lambda _, args, result: seen.append((result[0] if isinstance(result, tuple) else result).requires_grad)
        )
    loss = model(**batch).loss
    assert seen and not any(seen)
    loss.backward()
    trained = {id(parameter) for parameter in tuned.parameters()}
    assert all(id(p) in trained for p in model.parameters() if p.grad is not None)


def test_it_keeps_less_for_the_backward_pass_than_lora() -> None:
    kept = {}
    for name, method in (("lst", dw.LST(reduction=4)), ("lora", dw.LoRA(rank=4))):
        model = wide().train()
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        dw.attach(model, method)
        sizes: dict[int, int] = {}

        def pack(x: Tensor, own: set[int] = own, sizes: dict[int, int] = sizes) -> Tensor:
            if x.untyped_storage().data_ptr() not in own:
                sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        ids = torch.randint(5, 64, (8, 48))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            hidden = model.model(input_ids=ids).last_hidden_state
        assert hidden.requires_grad
        kept[name] = sum(sizes.values())
    assert kept["lst"] < 0.6 * kept["lora"]


def test_gates_start_half_open_and_are_sharp() -> None:
    _, _, tuned = adapted("llama")
    rungs = [module for module in ladders(tuned)[0].modules() if isinstance(module, Rung)]
    assert len(rungs) == 2
    for rung in rungs:
        rung.block, rung.tap = nn.Identity(), torch.zeros(1)
        assert rung(torch.ones(1)).item() == 0.5
        rung(torch.ones(1)).sum().backward()
        assert rung.gate.grad is not None and torch.allclose(rung.gate.grad, torch.tensor(0.25 / 0.1))


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_the_ladders_carry_the_base(family: str) -> None:
    model, batch, _ = adapted(family)
    before = model(**batch).logits
    block = dw.core.attach.describe(model).blocks[-1]
    zero = model.get_submodule(block.path).register_forward_hook(
        lambda _, args, result: (result[0] * 0, *result[1:]) if isinstance(result, tuple) else result * 0
    )
    assert not torch.allclose(model(**batch).logits, before, atol=1e-3)
    zero.remove()
    assert torch.equal(model(**batch).logits, before)


def test_only_the_side_output_predicts() -> None:
    model, batch, tuned = adapted("llama")
    with torch.no_grad():
        ladders(tuned)[0].up.weight.zero_()
        ladders(tuned)[0].up.bias.fill_(1.0)
    expected = model.lm_head(torch.ones(32))
    assert torch.allclose(model(**batch).logits, expected.expand(2, 9, -1), atol=1e-5)


def rows_of(part: Tensor, whole: Tensor) -> list[int] | None:
    """Rows of `whole` whose entries, on some columns common to all, make up `part`; None if there are none."""
    for columns in torch.combinations(torch.arange(whole.shape[1]), part.shape[1]):
        places = [(whole[:, columns] == row).all(1).nonzero().flatten().tolist() for row in part]
        if all(places):
            return [place[0] for place in places]
    return None


def entries_of(part: Tensor, whole: Tensor) -> set[float]:
    return set(part.flatten().tolist()) - set(whole.flatten().tolist())


def test_side_blocks_start_as_sub_matrices_of_the_base_blocks() -> None:
    for family, keep in (("llama", []), ("t5", [1]), ("gpt2", []), ("bert", [1]), ("mixtral", [])):
        model, _, tuned = adapted(family, keep=keep)
        for ladder in ladders(tuned):
            backbone = model.get_submodule(ladder.site.path)
            for name, own in ladder.side.named_parameters():
                inside = name.removeprefix(f"{ladder.blocks}.")
                if inside != name:
                    number, _, rest = inside.partition(".block.")
                    if not rest:
                        continue
                    name = f"{ladder.blocks}.{ladder.kept[int(number)]}.{rest}"
                if "relative_attention_bias" in name:
                    name = f"{ladder.blocks}.0.{rest}"
                assert not entries_of(own, backbone.get_parameter(name)), (family, name)


def test_query_key_and_value_share_rows_and_each_sublayer_its_stream() -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 8, "intermediate_size": 6, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER | shape | {"num_hidden_layers": 1}))
    base = model.model.layers[0]
    with torch.no_grad():
        model.model.embed_tokens.weight[:, [1, 3, 4, 6]] *= 10
        for layer, rows in ((base.self_attn, (0, 3, 5, 6)), (base.mlp, (2, 4, 5))):
            for name, weight in layer.named_parameters():
                if name.startswith(("q_", "k_", "v_", "gate", "up")):
                    weight[list(rows)] *= 10
        base.self_attn.o_proj.weight[[0, 1, 2, 5]] *= 10
        base.mlp.down_proj.weight[[1, 5, 6, 7]] *= 10
    tuned = dw.attach(model, dw.LST(reduction=2))
    side = ladders(tuned)[0].side.layers[0].block
    stream, heads, middle, inner, last = (
        torch.tensor(x) for x in ([1, 3, 4, 6], [0, 3, 5, 6], [0, 1, 2, 5], [2, 4, 5], [1, 5, 6, 7])
    )
    for name in ("q_proj", "k_proj", "v_proj"):
        given = base.self_attn.get_submodule(name).weight
        assert torch.equal(side.self_attn.get_submodule(name).weight, given[heads][:, stream])
    assert torch.equal(side.self_attn.o_proj.weight, base.self_attn.o_proj.weight[middle][:, heads])
    assert torch.equal(side.mlp.gate_proj.weight, base.mlp.gate_proj.weight[inner][:, middle])
    assert torch.equal(side.mlp.up_proj.weight, base.mlp.up_proj.weight[inner][:, middle])
    assert torch.equal(side.mlp.down_proj.weight, base.mlp.down_proj.weight[last][:, inner])


def test_queries_of_one_group_keep_the_rows_of_their_key() -> None:
    model, _, tuned = adapted("llama", keep=[0])
    side, base = ladders(tuned)[0].side.layers[0].block.self_attn, model.model.layers[0].self_attn
    key = rows_of(side.k_proj.weight[:, :2], base.k_proj.weight)
    query = rows_of(side.q_proj.weight[:, :2], base.q_proj.weight)
    assert key is not None and query is not None
    # Base: 2 key heads of 8 rows, 4 query heads; side: heads of 2 rows.
    expected = [(row // 8 * 2 + group) * 8 + row % 8 for head in (key[:2], key[2:]) for group in (0, 1) for row in head]
    assert query == expected


def test_fisher_needs_data_and_chooses_by_it() -> None:
    model, batch = FAMILIES["llama"]()
    with pytest.raises(ValueError, match="give batches"):
        dw.attach(model, dw.LST(init="fisher"))
    by_data = dw.attach(model, dw.LST(init="fisher"), data=[batch], seed=0).tensors()
    dw.detach(model)
    by_size = dw.attach(model, dw.LST(), seed=0).tensors()
    same = [torch.equal(by_data[name], by_size[name]) for name in by_data if "q_proj" in name]
    assert not all(same) and all(p.grad is None for p in model.parameters())


def test_the_side_decoder_attends_to_the_side_encoder() -> None:
    model, batch, tuned = adapted("t5")
    for linear in ladders(tuned)[1].down[1:]:
        nn.init.zeros_(linear.weight)
    states = model.encoder(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    assert states.shape[-1] == 32 + 4

    def logits(states: Tensor) -> Tensor:
        rest = {key: batch[key] for key in ("attention_mask", "labels")}
        return model(encoder_outputs=(states,), **rest).logits

    before, noise = logits(states), torch.randn_like(states)
    base, side = noise.clone(), noise.clone()
    base[..., 32:], side[..., :32] = 0, 0
    assert torch.allclose(logits(states + base), before, atol=1e-5)
    assert not torch.allclose(logits(states + side), before, atol=1e-3)


def test_the_count_is_the_papers() -> None:
    layers, d, ff, heads, r = 2, 32, 48, 4, 8
    _, _, tuned = adapted("t5")
    n, inner, size = d // r, ff // r, heads * (8 // r)
    attention, feed = 4 * n * size + n, 3 * n * inner + n
    bias, ladder = 32 * heads, (layers + 1) * (d * n + n) + layers
    encoder = layers * (attention + feed) + bias + n + ladder
    decoder = layers * (2 * attention + feed) + bias + n + ladder
    assert tuned.summary().trainable == encoder + decoder + n * d + d


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "t5", "bart", "mamba"])
@pytest.mark.parametrize("beams", [1, 3])
def test_cached_decoding_is_uncached_decoding(family: str, beams: int) -> None:
    model, _, tuned = adapted(family)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4)), alpha=0.3)
    real = slice(4) if family in ("t5", "bart") else slice(3, None)
    mask = torch.ones(2, 7, dtype=torch.long)
    if family != "mamba":
        mask[1] = torch.zeros(7, dtype=torch.long).index_fill(0, torch.arange(7)[real], 1)
    ids = tokens(2, 7) * mask
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams, "eos_token_id": None, "pad_token_id": 0}
    made = [model.generate(input_ids=ids, attention_mask=mask, use_cache=cache, **options) for cache in (True, False)]
    assert torch.equal(*made)
    if family != "mamba":
        alone = model.generate(input_ids=ids[1:, real], **options)
        assert torch.equal(made[0][1, -6:], alone[0, -6:])


def test_a_pooler_reads_the_side_output() -> None:
    model, batch, tuned = adapted("bert_classification")
    hidden = model.bert(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    assert torch.equal(hidden.pooler_output, model.bert.pooler(hidden.last_hidden_state))
    model(**batch).loss.backward()
    assert all(p.grad is not None for p in tuned.parameters())


def test_it_learns() -> None:
    model, batch, tuned = adapted("llama")
    optimizer = torch.optim.AdamW(tuned.parameter_groups(1e-2))
    losses = []
    for _ in range(30):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_what_cannot_be_is_refused_in_one_line() -> None:
    with pytest.raises(ValueError, match="names block 7, but LlamaForCausalLM has 2"):
        adapted("llama", keep=[0, 7])
    for family in ("vit", "whisper", "cnn"):
        with pytest.raises(ValueError, match="thin copy of a text model of transformers; "):
            adapted(family)
    model, batch, _ = adapted("llama")
    with pytest.raises(ValueError, match="static cache"):
        model.generate(batch["input_ids"], cache_implementation="static", max_new_tokens=2, pad_token_id=0)
