"""Max pooling that preserves the image size: definition, compiled op and Triton kernels."""
