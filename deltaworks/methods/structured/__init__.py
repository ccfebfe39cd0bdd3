"""Structured weight deltas.

A change of a weight need not be low-rank to be small: a few frequencies, circulant blocks, Kronecker factors or sparse
spectra describe a full matrix with few numbers, and often apply faster than it would.
"""
