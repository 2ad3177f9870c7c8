"""Tokenised text on disk: Megatron indexed datasets, their checksums, document maps and tokenizer."""
