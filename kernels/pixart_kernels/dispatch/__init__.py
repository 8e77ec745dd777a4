"""What the families share: the way to PyTorch's dispatcher and to a GPU, and rows inside kernels."""
