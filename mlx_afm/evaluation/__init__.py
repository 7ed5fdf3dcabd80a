"""How good a model or an adapter is."""
