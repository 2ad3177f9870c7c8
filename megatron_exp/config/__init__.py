"""Strict configuration: one YAML file, no silent defaults for misspelt keys."""
