"""The papers' experiments, each a file."""
