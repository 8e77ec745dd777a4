"""Who answers questions about a picture."""
