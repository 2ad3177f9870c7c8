"""Checkpoints: `catalogue` finds, checks and removes them without torch; `state` saves and loads model and optimizer.

RUN/checkpoints/step-00001000/ holds megatron-core's torch_dist files, extra.json (ours, readable), files.json (size and SHA-256 of
every file) and, written last, COMPLETE (the SHA-256 of files.json).
"""
