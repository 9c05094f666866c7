"""Tables of what compression cost and what it saved."""

from jaxcomp.report.tables import Row, leaf_table, stage_table

__all__ = ["Row", "leaf_table", "stage_table"]
