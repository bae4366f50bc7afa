"""The cache as a value."""
