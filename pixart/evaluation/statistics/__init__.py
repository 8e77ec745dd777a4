"""Intervals, tests and agreement: what a number is printed with."""
