"""Adaptive weight deltas.

Not every weight needs the same rank. These methods move a budget of parameters between layers while they train: they
score what has been spent, drop what matters least, and grow where it pays.
"""
