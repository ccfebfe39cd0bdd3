"""Sparse methods: most of the base stays exactly as it is, and a chosen few of its own values move.

What is chosen may be a kind of vector (biases, norms), whole neurons, or single entries, by rule or by measuring the
task. The change is kept beside the base, so that only it is stored, and detaching gives the base back bit for bit.
"""
