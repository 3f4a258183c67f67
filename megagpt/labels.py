"""Labels of positions, shared by the data and the loss."""

IGNORED = -100
"""Label of a position that does not count in the loss (torch's convention)."""
