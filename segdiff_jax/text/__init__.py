"""From class names to the context that the UNet attends to."""
