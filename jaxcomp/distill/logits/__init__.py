"""Losses between the logits of a student and of its teachers."""
