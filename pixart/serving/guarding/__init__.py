"""Who may ask: the guard before everything else, and what it looks at."""
