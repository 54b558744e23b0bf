"""From batches to trained parameters."""
