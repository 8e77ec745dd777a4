"""Protocols: what decides a number, and a paper's numbers beside ours."""
