"""Channels rescaled between layers, with the function kept: equalisation and SmoothQuant."""
