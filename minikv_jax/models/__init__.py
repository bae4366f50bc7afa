"""The decoder in Flax, the families it covers, and the checkpoints it is read from."""
