"""Pruning a trained network at once: evidence from data, and the methods that need no training."""
