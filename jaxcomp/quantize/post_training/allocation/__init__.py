"""Bits for each layer under a budget, from what each costs the outputs."""
