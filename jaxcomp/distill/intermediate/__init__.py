"""Losses between what layers of a student and of its teacher compute."""
