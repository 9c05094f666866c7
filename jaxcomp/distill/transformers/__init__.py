"""Losses between layers of transformers, and which layer learns from which."""
