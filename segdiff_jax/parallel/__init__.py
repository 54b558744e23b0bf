"""Everything that knows how many devices and processes there are."""
