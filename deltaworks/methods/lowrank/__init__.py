"""Low-rank weight deltas.

A trained change of a weight has low intrinsic rank, so it is written as a product of two thin matrices. The pages
differ in where the factors start, which of them train, how they are scaled, and what they share.
"""
