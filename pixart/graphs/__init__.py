"""Calls of a model recorded as CUDA graphs and replayed: one launch in the place of some hundred."""
