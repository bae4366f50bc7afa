"""The `minikv` command."""
