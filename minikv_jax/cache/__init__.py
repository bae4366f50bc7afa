"""The KV cache as a value: its state, budgets, capacities, bytes and files."""
