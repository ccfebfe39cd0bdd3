"""Mixtures: several small changes at one place, and a router that weighs them for every token.

The pages differ in what an expert is (a vector, a low-rank delta, an adapter), in what the router reads, and in whether
it takes all experts or a few.
"""
