"""Networks that turn pictures and texts into numbers, from files that the user has."""
