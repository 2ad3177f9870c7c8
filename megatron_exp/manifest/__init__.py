"""The manifest: the only thing that crosses the stages."""
