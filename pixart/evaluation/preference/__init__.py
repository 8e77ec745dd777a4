"""The preference study: blind pairs, votes of people and of judges, and what they say together."""
