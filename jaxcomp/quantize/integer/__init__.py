"""Models that multiply integers: packed weights and rounded activations as they are, scaled after.

:mod:`operands` says which products read a packed leaf through changes of layout alone,
:mod:`weights` lays such a leaf out for its product, :mod:`products` does one product in integers,
and :mod:`applied` runs a whole model so.
"""
