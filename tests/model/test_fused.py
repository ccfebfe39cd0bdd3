"""Parts of fused weights, against the split that each family's own code makes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from deltaworks.model import fused
from deltaworks.model.anatomy import Site, describe
from deltaworks.model.kinds import linear_shape
from deltaworks.model.weights import Weight
from tests.families import FAMILIES, INNER, WIDTH, tokens

FUSED = ["gpt2", "gpt_neox", "falcon", "falcon_new", "falcon_rw", "bloom", "phi3", "modernbert"]
SPLITS = {"falcon": "_split_heads", "falcon_new": "_split_heads", "falcon_rw": "_split_heads", "bloom": "_reshape"}


def site_of(model: nn.Module, role: str, block: int = 0) -> Site:
    return next(site for site in describe(model).sites if site.role == role and site.block == block)


def split_by(model: nn.Module, name: str, batch: dict[str, Any]) -> dict[str, Tensor]:
    """Queries, keys and values of the first block as the family's own code makes them in a forward pass."""
    attention = model.get_submodule(str(describe(model).blocks[0].attention))
    seen: list[Tensor] = []
    if name in SPLITS:
        own: Callable[[Tensor], tuple[Tensor, ...]] = getattr(type(attention), SPLITS[name])

        def splitting(mixed: Tensor) -> tuple[Tensor, ...]:
            seen.extend(own(attention, mixed))
            return own(attention, mixed)

        attention.__dict__[SPLITS[name]] = splitting
        model(**batch)
        del attention.__dict__[SPLITS[name]]
    else:

        def listening(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if module is attention:
                seen.extend(args[:3])
            return sdpa_attention_forward(module, *args, **kwargs)

        AttentionInterface.register("listening", listening)
        AttentionMaskInterface.register("listening", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
        model.set_attn_implementation("listening")
        model(**batch)
    return dict(zip(("query", "key", "value"), [tensor.clone() for tensor in seen], strict=True))


def zero_rows(model: nn.Module, site: Site) -> None:
    """Make nought of the site's rows, in weight and bias."""
    assert site.rows is not None
    layer = model.get_submodule(site.path)
    weight = Weight(layer, site.parameter or "weight")
    rows = torch.tensor(site.rows)
    weight.canonical(weight.stored.data)[..., rows, :] = 0  # type: ignore[union-attr]
    if isinstance(bias := layer._parameters.get("bias"), Tensor):
        bias.data[rows] = 0


@pytest.mark.parametrize("part", ["query", "key", "value"])
@pytest.mark.parametrize("name", FUSED)
@torch.no_grad()
def test_a_part_of_a_fused_projection_is_what_the_model_splits_off(name: str, part: str) -> None:
    model, _ = FAMILIES[name]()
    batch = {"input_ids": tokens()}
    before = split_by(model, name, batch)
    zero_rows(model, site_of(model, f"attention.{part}"))
    after = split_by(model, name, batch)
    for other in before:
        assert (before[other] != 0).all()
        assert torch.equal(after[other], torch.zeros_like(before[other]) if other == part else before[other])


@pytest.mark.parametrize("name", FUSED)
def test_the_attention_itself_was_asked(name: str) -> None:
    model, _ = FAMILIES[name]()
    parts = {part: site_of(model, f"attention.{part}") for part in ("query", "key", "value")}
    output = site_of(model, "attention.output").path
    answer = fused.ask_attention(model, parts["query"].path, output)
    assert answer == {part: site.rows for part, site in parts.items()}


@pytest.mark.parametrize("name", FUSED)
def test_the_layout_is_known_when_the_attention_cannot_be_asked(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = describe(FAMILIES[name]()[0]).sites
    monkeypatch.setattr(fused, "ask_attention", lambda *_: {})
    assert describe(FAMILIES[name]()[0]).sites == asked


@pytest.mark.parametrize("name", [*FUSED, "mixtral", "olmoe", "qwen3_moe"])
def test_parts_cover_a_fused_weight_without_overlap(name: str) -> None:
    model, _ = FAMILIES[name]()
    sites = describe(model).sites
    for whole in [site for site in sites if site.role in ("attention.qkv", "mlp.gate_up", "expert.gate_up")]:
        parts = [s.rows for s in sites if s.part and (s.path, s.parameter) == (whole.path, whole.parameter)]
        fan_out = Weight(model.get_submodule(whole.path), whole.parameter or "weight").fan_out
        assert sorted(row for rows in parts for row in rows or ()) == list(range(fan_out))


def test_a_layout_no_name_tells_is_found_by_asking() -> None:
    """GPT-BigCode's `c_attn` interleaves query, key and value head by head, GPT-2's stacks them."""
    config = hf.GPTBigCodeConfig(
        vocab_size=64, n_positions=64, n_embd=WIDTH, n_layer=2, n_head=4, n_inner=INNER, multi_query=False
    )
    model = hf.GPTBigCodeForCausalLM(config).eval()
    rows = site_of(model, "attention.key").rows
    assert rows == tuple(row for head in range(4) for row in range(24 * head + 8, 24 * head + 16))


@pytest.mark.parametrize("name", ["phi3", "modernbert"])
@torch.no_grad()
def test_the_gate_is_the_half_that_is_activated(name: str) -> None:
    model, batch = FAMILIES[name]()
    gate, up = site_of(model, "mlp.gate"), site_of(model, "mlp.up")
    mlp = model.get_submodule(str(describe(model).blocks[0].mlp))
    activation = next(m for n, m in mlp.named_children() if "act" in n)
    seen: dict[str, Tensor] = {}
    mlp.get_submodule(gate.path.rpartition(".")[2]).register_forward_hook(lambda _, a, out: seen.update(whole=out))
    activation.register_forward_hook(lambda _, args, out: seen.update(activated=args[0]))
    model(**batch)
    assert torch.equal(seen["activated"], seen["whole"][..., torch.tensor(gate.rows)])
    assert not torch.equal(seen["activated"], seen["whole"][..., torch.tensor(up.rows)])


def test_a_gate_that_comes_second_is_found() -> None:
    class Reversed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(WIDTH, 2 * INNER)
            self.second = nn.Linear(INNER, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            up, gate = self.first(x).chunk(2, -1)
            return self.second(up * nn.functional.silu(gate))

    mlp = Reversed()
    rows = fused.gate_up_rows(mlp, mlp.first, mlp.second)
    assert rows == {"gate": tuple(range(INNER, 2 * INNER)), "up": tuple(range(INNER))}


@pytest.mark.parametrize("name", ["mixtral", "olmoe", "qwen3_moe"])
@torch.no_grad()
def test_an_expert_s_gate_is_the_half_that_is_activated(name: str) -> None:
    model, batch = FAMILIES[name]()
    seen: list[Tensor] = []
    experts = model.get_submodule(str(describe(model).blocks[1].experts))
    experts.act_fn.register_forward_hook(lambda _, args, out: seen.append(args[0].clone()))

    def activated() -> Tensor:
        seen.clear()
        model(**batch)
        return torch.cat([rows.flatten() for rows in seen])

    before = activated()
    zero_rows(model, site_of(model, "expert.up", block=1))
    assert torch.equal(activated(), before)
    zero_rows(model, site_of(model, "expert.gate", block=1))
    assert not activated().any()


@torch.no_grad()
def test_experts_whose_gate_and_up_alternate() -> None:
    config = hf.GptOssConfig(
        vocab_size=64, hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_local_experts=4, num_experts_per_tok=2, pad_token_id=0,
    )  # fmt: skip
    model = hf.GptOssForCausalLM(config).eval()
    gate, up = site_of(model, "expert.gate"), site_of(model, "expert.up")
    assert (gate.rows, up.rows) == (tuple(range(0, 2 * INNER, 2)), tuple(range(1, 2 * INNER, 2)))
    experts = model.get_submodule(gate.path)
    experts.down_proj_bias.zero_()  # type: ignore[union-attr, operator]
    experts.gate_up_proj_bias.zero_()  # type: ignore[union-attr, operator]
    seen: list[Tensor] = []
    experts.register_forward_hook(lambda _, args, out: seen.append(out))
    for site in (up, gate):  # without up, (up + 1) * glu(gate) remains; without gate, nothing does
        zero_rows(model, site)
        model(input_ids=tokens())
    assert seen[0].any() and not seen[1].any()


def test_fused_widths_that_are_no_three_projections_give_no_parts() -> None:
    model, _ = FAMILIES["gpt2"]()
    layer = "transformer.h.0.attn.c_attn"
    fan_out = linear_shape(model.get_submodule(layer))[0]
    assert fused.qkv_rows(model, layer, None, heads=5, kv_heads=4, head_dim=8, fan_out=fan_out) == {}
