"""Diffusion mathematics: pure functions on arrays, no networks."""
