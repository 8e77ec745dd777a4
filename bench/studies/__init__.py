"""Experiments whose reports stand beside their code."""
