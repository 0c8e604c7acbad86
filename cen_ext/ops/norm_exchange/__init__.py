"""Normalize, exchange, add, activate: the definition, the compiled op, Triton, process groups."""
