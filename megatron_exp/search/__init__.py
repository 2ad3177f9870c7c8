"""Exact search of many token strings at once: over shards, over the stream as trained, over payloads.

strings -> Patterns (grouped by length, hashed) -> scan (rolling hash, filter, exact check) -> Matches -> slots, steps, documents
"""
