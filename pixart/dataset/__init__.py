"""From raw pictures and captions to batches of features."""
