"""Which of two evaluated folders is better."""
