"""The page in a browser: what it asks, what it shows, what it refuses."""
