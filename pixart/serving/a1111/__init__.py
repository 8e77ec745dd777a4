"""The calls of A1111's web UI that its clients use."""
