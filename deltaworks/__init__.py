"""Deltaworks fine-tunes a model by changing less of it."""
