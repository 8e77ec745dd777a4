"""What is measured: sizes, calls, peers and models."""
