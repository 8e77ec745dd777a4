"""The queue, and what draws: one worker that owns the pipeline."""
