"""A thin copy of a backbone that climbs beside it, fed by its hidden states and never feeding it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache, StaticLayer

from ...model.anatomy import describe
from ...model.kinds import GRAFT
from ..part import Part, Wrapper
from .soft_prompt import named_arguments, parameters_of

CACHES = ("past_key_values", "cache_params")


class Ladder(Wrapper):
    """Takes a backbone's prediction from a side network of its own class at reduced width.

    The backbone runs without autograd. Its first block's input and the outputs of the blocks in `kept` go down one
    linear layer each; before every side block what came down is mixed in,
    `s <- g s + (1 - g) D h` with `g = sigmoid(gate / temperature)`; the side network's output goes up to the base's
    width.

    Args:
        config: the side network's configuration as JSON, with `model_type`; it has as many blocks as `kept` has.
        path: of the backbone in the model that the configuration describes.
        predicts: whether its output is the prediction; the encoder of an encoder-decoder predicts nothing, its side
            network is read by the decoder's.
        blocks: path of the blocks within the backbone.
        kept: which of the base's blocks are read.
        width: of the base's hidden states.
        temperature: T.
    """

    settings = ("config", "path", "predicts", "blocks", "kept", "width", "temperature")

    def __init__(
        self, config: str, path: str, predicts: bool, blocks: str, kept: list, width: int, temperature: float
    ) -> None:
        super().__init__()
        self.config, self.path, self.predicts, self.blocks, self.kept = config, path, predicts, blocks, list(kept)
        self.width, self.temperature = width, temperature
        self.side = without_inputs(thin_model(config)).get_submodule(path)
        rungs = self.side.get_submodule(blocks)
        assert isinstance(rungs, nn.ModuleList)
        if len(rungs) != len(self.kept):
            raise ValueError(f"the side network has {len(rungs)} blocks for the {len(self.kept)} it should read")
        for index, block in enumerate(rungs):
            rungs[index] = Rung(block, temperature)
        shape: Any = self.side.config
        narrow = shape.hidden_size
        self.down = nn.ModuleList(nn.Linear(width, narrow) for _ in range(len(self.kept) + 1))
        self.up = nn.Linear(narrow, width) if predicts else None

    @classmethod
    def remade(cls, settings: dict[str, Any], tensors: dict[str, Tensor], shared: dict[str, nn.Module]) -> Part:
        # The side network has buffers that are computed when it is made (rotary frequencies), so it cannot stay on the
        # meta device; a first one made there tells whether the file's tensors are of the sizes that would be allocated.
        try:
            with torch.device("meta"):
                wanted = cls(**settings).tensors()
            sizes = {name: tuple(value.shape) for name, value in tensors.items()}
            if {name: tuple(value.shape) for name, value in wanted.items()} != sizes:
                raise ValueError("the tensors are not those of the side network it describes")
            with torch.random.fork_rng(devices=[]):
                part = cls(**settings)
        except (TypeError, AttributeError, KeyError, AssertionError, OverflowError, RuntimeError) as error:
            raise ValueError(f"no {cls.__name__} can be made of {sorted(settings)}: {error}") from None
        part.load_state_dict(tensors, assign=True)
        return part

    def within(self, layer: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = named_arguments(layer, args, kwargs)
        if "use_cache" in parameters_of(type(layer)) and given.get("use_cache") is None and torch.is_grad_enabled():
            given["use_cache"] = any(given.get(name) is not None for name in CACHES)
        context = given.get("encoder_hidden_states")
        if context is not None:
            given["encoder_hidden_states"] = context[..., : self.width]
        with resting(layer), torch.no_grad(), tapped(layer.get_submodule(self.blocks), self.kept) as taps:
            result = call(**{**given, "return_dict": True})
        side = self._climb(layer, given, context, taps, result)
        if self.up is None:
            new = torch.cat((result.last_hidden_state, side.to(result.last_hidden_state.dtype)), -1)
        else:
            new = project(self.up, side, result.last_hidden_state.dtype)
        result["last_hidden_state"] = new
        if result.get("pooler_output") is not None:
            result["pooler_output"] = layer.pooler(new)  # type: ignore[operator]
        return result.to_tuple() if given.get("return_dict") is False else result

    def _climb(
        self, layer: nn.Module, given: dict[str, Any], context: Tensor | None, taps: list[Tensor], result: Any
    ) -> Tensor:
        """The side network's last hidden states, `batch x tokens x narrow`."""
        dtype = next(self.down.parameters()).dtype
        first, *rest = (project(down, tap, dtype) for down, tap in zip(self.down, taps, strict=True))
        dropped = ("input_ids", "token_type_ids", "output_hidden_states", "output_attentions")
        inputs = {name: value for name, value in given.items() if name not in dropped}
        inputs |= {"inputs_embeds": first, "return_dict": True}
        if context is not None:
            inputs["encoder_hidden_states"] = context[..., self.width :].to(dtype)
        for name in CACHES:
            if name in parameters_of(type(layer)):
                cache = getattr(result, name, None)
                inputs |= {name: None if cache is None else self._shelf(cache), "use_cache": cache is not None}
        rungs = list(self.side.get_submodule(self.blocks).children())
        for rung, tap in zip(rungs, rest, strict=True):
            rung.tap = tap  # type: ignore[assignment]
        try:
            return self.side(**inputs).last_hidden_state
        finally:
            for rung in rungs:
                rung.tap = None  # type: ignore[assignment]

    def _shelf(self, cache: Cache) -> Cache:
        """A cache for the side network that lives within the base's, so that whatever reorders or crops that takes it
        along."""
        if isinstance(cache, EncoderDecoderCache):
            own, cross = (self._shelf(part) for part in (cache.self_attention_cache, cache.cross_attention_cache))
            return EncoderDecoderCache(own, cross)
        if any(isinstance(held, StaticLayer) for held in cache.layers):
            raise ValueError("a static cache has no room for a side network's keys; take the default cache")
        mine: list[Any] = [held for held in cache.layers if getattr(held, "ladder", None) == id(self)]
        if not mine:
            config: Any = self.side.config
            mine = DynamicCache(config=config).layers
            for held in mine:
                held.ladder = id(self)
            cache.layers.extend(mine)
        shelf = DynamicCache()
        shelf.layers = mine
        return shelf


class Rung(nn.Module):
    """A side block that first mixes in what comes from the base.

    Args:
        block: the block; this module answers for it in everything else.
        temperature: T, that of the gate.
    """

    tap: Tensor | None

    def __init__(self, block: nn.Module, temperature: float) -> None:
        super().__init__()
        self.block, self.temperature, self.tap = block, temperature, None
        self.gate = nn.Parameter(torch.zeros(()))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._modules["block"], name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The block's output for `g hidden_states + (1 - g) tap`."""
        gate = torch.sigmoid(self.gate / self.temperature)
        assert self.tap is not None
        return self.block(gate * hidden_states + (1 - gate) * self.tap, *args, **kwargs)


class Nothing(nn.Module):
    """Stands where a thin copy would look up tokens or positions: adds zero."""

    zero: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("zero", torch.zeros(()), persistent=False)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Zero, of no shape."""
        return self.zero


def described(config: dict[str, Any]) -> str:
    """A configuration as the plain text that a part's settings hold."""
    return json.dumps(config)


def thin_model(config: str) -> nn.Module:
    """A model without head, made new from a configuration as JSON.

    Raises:
        ValueError: when the configuration is none that transformers knows.
    """
    read = json.loads(config)
    if not isinstance(read, dict) or not isinstance(read.get("model_type"), str):
        raise ValueError("the side network's configuration has no model_type")
    model = AutoModel.from_config(AutoConfig.for_model(**read), trust_remote_code=False, dtype=torch.float32)
    return model.eval()


def without_inputs(model: nn.Module) -> nn.Module:
    """The model without what it would look up of tokens and positions, and without pooler, in place."""
    anatomy = describe(model)
    drop = {path for stack in anatomy.stacks for path in (stack.embedding, stack.position)}
    drop |= {site.path for site in anatomy.sites if site.role == "token_type"}
    for path, module in list(model.named_modules()):
        for name in list(module._modules):
            if name == "pooler" and not path:
                module._modules[name] = None
            elif f"{path}.{name}".lstrip(".") in drop:
                module._modules[name] = Nothing()
    return model


@contextlib.contextmanager
def tapped(blocks: nn.Module, kept: Sequence[int]) -> Iterator[list[Tensor]]:
    """Collects the first block's input and the outputs of the blocks `kept`, in this order, while the blocks run."""
    taps: list[Tensor] = []

    def before(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        taps.append((args[0] if args else kwargs["hidden_states"]).detach())

    def after(_: nn.Module, args: tuple, result: Any) -> None:
        taps.append((result[0] if isinstance(result, tuple) else result).detach())

    children = list(blocks.children())
    handles = [children[0].register_forward_pre_hook(before, with_kwargs=True)]
    handles += [children[index].register_forward_hook(after) for index in kept]
    try:
        yield taps
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def resting(layer: nn.Module) -> Iterator[None]:
    """The base in evaluation mode, what is attached to it as it was."""
    awake: list[nn.Module] = []

    def rest(module: nn.Module) -> None:
        if module.training:
            awake.append(module)
            module.training = False
        for name, child in module.named_children():
            if name != GRAFT:
                rest(child)

    rest(layer)
    try:
        yield
    finally:
        for module in awake:
            module.training = True


def project(linear: nn.Module, x: Tensor, dtype: torch.dtype) -> Tensor:
    """A linear layer in the dtype of its input where that is the smaller one, its result in `dtype`."""
    assert isinstance(linear, nn.Linear)
    low = x.dtype if x.element_size() < linear.weight.element_size() else linear.weight.dtype
    low = dtype if torch.finfo(dtype).bits < torch.finfo(low).bits else low
    return F.linear(x.to(low), linear.weight.to(low), linear.bias.to(low)).to(dtype)
