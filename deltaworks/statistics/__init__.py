"""What data-driven methods measure before they attach, over a few batches.

Every function here runs the model on batches as it is called (dictionaries of tensors) and leaves it exactly as it was:
values, flags, gradients, training mode, buffers, random state. Memory stays bounded by what is asked for: gradients are
taken tensor by tensor while the backward pass runs, and activation moments can be spread over several passes.
"""

from .activations import SecondMoment, second_moments
from .alike import same_inputs
from .gradients import each_gradient, fisher, mean_gradients, squared_gradients
from .probe import cosines, probe
from .products import product_gradients
from .routing import RouterLoad, router_loads
from .running import examples, loss_of, moved, untouched

__all__ = [
    "RouterLoad",
    "SecondMoment",
    "cosines",
    "each_gradient",
    "examples",
    "fisher",
    "loss_of",
    "mean_gradients",
    "moved",
    "probe",
    "product_gradients",
    "router_loads",
    "same_inputs",
    "second_moments",
    "squared_gradients",
    "untouched",
]
