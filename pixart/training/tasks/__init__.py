"""What a stage can train, a file for each."""
