"""Activations that are rounded where a model multiplies them, without a change to the model.

The model is read through its jaxpr; :mod:`points` says where it can be rounded and by what name,
:mod:`traced` runs it so, and on that stand the functions for users: :mod:`dynamic` (ranges of each
call, or given ones), :mod:`observed` (ranges from batches) and :mod:`tracked` (from training).
"""
