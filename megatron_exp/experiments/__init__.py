"""Experiments: the protocol, what they may ask for while planned, and one file for each."""
