"""The reference model of preference training: the policy itself, with its adapters off."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..core.attach import disable


class Reference(nn.Module):
    """Calls the policy as its base. It owns no tensor, so moving, sharding and counting it cost nothing.

    Args:
        policy: the adapted model.
    """

    policy: Any

    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        self.__dict__["policy"] = policy  # not a child: its parameters are the trainer's model's
        self.config = policy.config

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with disable(self.policy):
            return self.policy(*args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # TRL gives `forward` a fused head that would read the policy's; the policy has one of its own by then.
        return Reference.forward(self, *args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:  # type: ignore[override]
        """The base's tensors, by which TRL knows cached reference values again."""
        with disable(self.policy):
            tensors = self.policy.state_dict(*args, **kwargs).items()
            return {name: value.clone() for name, value in tensors if ".deltaworks." not in f".{name}"}
