"""Attaching changes to models: parts, grafts, methods, rules, the registry."""
