"""Which metric notices which kind of error, against the exact checker."""
