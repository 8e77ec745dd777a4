"""What the command line draws, where to, and what it says."""
