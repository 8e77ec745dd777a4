"""Pictures that are judged, and what is kept of them: features and scores, in parts."""
