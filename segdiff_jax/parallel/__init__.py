"""Everything that knows how many devices there are, and which."""
