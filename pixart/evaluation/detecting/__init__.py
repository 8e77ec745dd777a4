"""What is in a picture, and where, for GenEval and T2I-CompBench."""
