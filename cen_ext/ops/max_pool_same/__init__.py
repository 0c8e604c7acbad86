"""Max pooling that keeps its size: the definition, the compiled op and the Triton kernels."""
