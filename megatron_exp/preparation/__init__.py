"""Before training: text to a corpus (`preprocess`), config and corpus to a manifest (`plan`)."""
