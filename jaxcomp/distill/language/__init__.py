"""Losses for language models, teachers kept in files, and text that students write themselves."""
