"""Stable Diffusion networks as Flax NNX modules, channel-last."""
