"""The .jxc file: save, load and inspect trees with compressed leaves.

A file is a safetensors file that holds no code; :mod:`jaxcomp.checkpoint.container` describes its
bytes, :mod:`~jaxcomp.checkpoint.manifest` and :mod:`~jaxcomp.checkpoint.leaves` what it says of the
tree, :mod:`~jaxcomp.checkpoint.coder` how symbols are coded.
"""

from jaxcomp.checkpoint.errors import CheckpointError
from jaxcomp.checkpoint.inspection import Inspection, LeafInfo, inspect
from jaxcomp.checkpoint.loading import load
from jaxcomp.checkpoint.saving import save

__all__ = ["CheckpointError", "Inspection", "LeafInfo", "inspect", "load", "save"]
