"""Tables of what compression cost and what it saved."""
