"""The Triton kernels of ``norm_exchange`` and their launches."""
