"""Finding out how much less work a model can do per picture: what `python -m pixart.calibrate` does."""
