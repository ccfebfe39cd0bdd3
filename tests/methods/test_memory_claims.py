"""What the papers say of memory and files, measured: bytes saved for backward, kept as state, alive at once, stored."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

import deltaworks as dw
from deltaworks.core.method import Method
from deltaworks.model.loading import load_base
from tests.methods.toys import net

WIDE, NARROW, TOKENS = 96, 64, 10


def saved_bytes(method: Method | None) -> int:
    """Bytes that one layer, 96 wide, keeps for backward, for 10 tokens whose gradient is wanted as well."""
    model, _ = net(WIDE, NARROW, 4)
    if method is not None:
        dw.attach(model, method, seed=0)
    else:
        model.requires_grad_(False)
    held: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(value: Tensor) -> Tensor:
        if value.untyped_storage().data_ptr() not in own:
            held[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        return value

    x = torch.randn(1, TOKENS, WIDE, dtype=torch.float64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        y = model.first(x)
    assert y.requires_grad
    return sum(held.values())


@pytest.mark.parametrize("rank", [1, 4, 16])
def test_lora_fa_keeps_the_rank_where_lora_keeps_the_width_as_well(rank: int) -> None:
    token = 8 * TOKENS
    assert saved_bytes(None) == 0
    assert saved_bytes(dw.LoRA(on="first", rank=rank)) == token * (WIDE + rank)
    assert saved_bytes(dw.LoRAFA(on="first", rank=rank)) == token * rank
    assert saved_bytes(dw.LoRAAsym(on="first", rank=rank)) == token * rank


def trained(method: Method, count: int = 3) -> tuple[dw.Tuned, torch.optim.Optimizer]:
    """An adapter after some steps of Adam, gradients still there."""
    model, x = net(16, 16, 16)
    tuned = dw.attach(model, method, seed=0)
    optimizer = torch.optim.Adam(tuned.parameter_groups(1e-2))
    rules = tuned.run(count, optimizer=optimizer)
    rules.emit("attached")
    for _ in range(count):
        optimizer.zero_grad()
        rules.emit("step_begin")
        model(x).square().mean().backward()
        rules.emit("gradients")
        optimizer.step()
        rules.emit("step_end")
    return tuned, optimizer


def state_numbers(tuned: dw.Tuned, optimizer: torch.optim.Optimizer) -> tuple[int, int]:
    """How many numbers are kept as gradients, and as moments."""
    gradients = sum(p.grad.numel() for p in tuned.model.parameters() if p.grad is not None)
    moments = [value for held in optimizer.state.values() for value in held.values() if isinstance(value, Tensor)]
    return gradients, sum(value.numel() for value in moments if value.dim())


@pytest.mark.parametrize("grain", ["element", "component"])
def test_lora_sp_keeps_gradients_and_moments_for_half_of_lora(grain: str) -> None:
    whole = state_numbers(*trained(dw.LoRA(on=nn.Linear, rank=4)))
    half = state_numbers(*trained(dw.LoRASP(on=nn.Linear, rank=4, grain=grain)))
    assert whole == (256, 512) and half == (128, 256)


def test_aflora_keeps_neither_gradient_nor_moments_of_what_it_has_frozen() -> None:
    tuned, optimizer = trained(dw.AFLoRA(on=nn.Linear, rank=4), count=40)
    frozen = [p for part in tuned.parts() for p in part.parameters() if not p.requires_grad]
    left = sum(p.numel() for p in tuned.parameters())
    assert sum(p.numel() for p in frozen) > left > 0
    assert all(p.grad is None and p not in optimizer.state for p in frozen)
    assert state_numbers(tuned, optimizer) == (left, 2 * left)


def stored(method: Method, folder: Path, *, finished: bool = False) -> int:
    """Bytes of the tensors in an adapter's file for a layer 512 x 256 and one 256 x 512, in float32."""
    model = nn.Sequential(nn.Linear(512, 256), nn.Linear(256, 512))
    tuned = dw.attach(model, method, seed=0)
    if finished:
        tuned.run(1).emit("finished")
    dw.save(model, folder)
    values = sum(value.numel() * value.element_size() for value in tuned.tensors().values())
    assert values <= (folder / "adapter.safetensors").stat().st_size < values + 4096, "more than tensors and names"
    return values


def test_randlora_stores_its_scalings_and_no_basis(tmp_path: Path) -> None:
    count = 256 // 8
    assert stored(dw.RandLoRA(on=nn.Linear, rank=8), tmp_path) == 2 * 4 * count * (8 + 256)


def test_vb_lora_stores_choices_and_no_logits(tmp_path: Path) -> None:
    bank, pieces, top = 90 * 32, 4 * (512 + 256) // 32, 2
    method = dw.VBLoRA(on=nn.Linear, rank=4, vectors=90, length=32, top=top)
    kept = stored(dw.VBLoRA(on=nn.Linear, rank=4, vectors=90, length=32, top=top, keep_logits=True), tmp_path / "all")
    assert kept == 4 * (bank + 2 * pieces * 90)
    # An index is a byte where 256 will do, and of k weights that sum to 1 all but the last are kept.
    assert stored(method, tmp_path / "some", finished=True) <= 4 * bank + 2 * pieces * (top * 2 + (top - 1) * 4)


def peak(call: Callable[[], object]) -> int:
    """Largest number of bytes that were allocated during a call and not yet freed."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return max(accumulate(size for _, size in changes))


def base(folder: Path, layers: int, quantize: str | None) -> nn.Module:
    config = LlamaConfig(
        vocab_size=16, hidden_size=128, intermediate_size=256, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=64,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return load_base(folder, quantize=quantize) if quantize else LlamaForCausalLM(config)


@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize("method", [dw.EVA(rank=1, per_pass=1), dw.LoRAGA(rank=1, per_pass=1)], ids=lambda m: m.slug)
def test_measuring_holds_one_layer_at_a_time_whatever_the_depth(
    method: Method, quantize: str | None, tmp_path: Path
) -> None:
    """A pass through the base aside; the largest layer has 128 x 256 values, and EVA's moments are in float64."""
    batches = [{"input_ids": torch.arange(8).view(1, 8), "labels": torch.arange(8).view(1, 8)}]

    def extra(layers: int) -> int:
        model = base(tmp_path / str(layers), layers, quantize).eval().requires_grad_(False)

        def run() -> None:
            embedded = model.get_input_embeddings()(batches[0]["input_ids"]).requires_grad_()
            model(inputs_embeds=embedded, labels=batches[0]["labels"]).loss.backward()

        whole = peak(lambda: dw.attach(model, method, data=batches, seed=0))
        return whole - peak(run)

    one = 128 * 256 * 4
    shallow, deep = extra(1), extra(3)
    kept = 2 * 7 * 4 * (128 + 256) * 4  # two more layers' singular vectors
    assert deep <= shallow + kept
    assert deep <= kept + (2 * 256 * 256 * 8 + 3 * 256 * 256 * 8 if method.slug == "eva" else 4 * one)
