"""How good a model is: metrics, protocols, statistics, pages."""
