"""Plans: what a model is drawn with to do less work per picture, measured and kept in a file."""
