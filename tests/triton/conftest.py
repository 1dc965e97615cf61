"""Helpers of this folder are imported by their names."""
