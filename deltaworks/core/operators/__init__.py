"""Operators: the forms a weight change can take, each with its fast product, shared by the method pages."""
