"""Networks on disk: Stable Diffusion folders, checkpoints and workdirs, in and out."""
