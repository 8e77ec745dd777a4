"""How operators reach PyTorch's dispatcher and a GPU."""
