"""Draws, scores, and writes results."""
