"""The Llama family in Flax, and the checkpoints that it is read from."""
