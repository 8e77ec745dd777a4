"""Repositories that diffusers opens: the folder of a model, its card, and the way to the hub."""
