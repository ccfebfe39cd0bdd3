"""Modules on activations: the base's weights stay, and small learned functions change what flows between them.

The pages differ in where they sit (after a sub-layer, beside it, at its norm, on its inner activation), what they
compute (a bottleneck, a scaling), and whether the change can be folded into a weight afterwards.
"""
