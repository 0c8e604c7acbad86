"""The operator ``norm_exchange``: definition, compiled op, Triton kernels and synchronized statistics."""
