"""Nothing the library remembers keeps a model alive."""

import gc
import weakref

import deltaworks as dw
from tests.families import FAMILIES


def test_a_model_that_was_adapted_can_be_freed() -> None:
    model, batch = FAMILIES["llama"]()
    dw.attach(model, dw.LoRA(rank=2))
    model(**batch).loss.backward()
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None
