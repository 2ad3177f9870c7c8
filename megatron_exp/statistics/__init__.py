"""Small, pure statistical functions: numpy and scipy.special only; randomness comes in as keyed `Words`."""
