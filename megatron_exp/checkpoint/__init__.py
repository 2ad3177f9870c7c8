"""Checkpoints: `catalogue` finds, checks and removes them without torch; `state` saves and loads model and optimizer.

`convert` turns them into Hugging Face models and back; `stored` reads and writes their tensors one by one for it.

RUN/checkpoints/step-00001000/ holds megatron-core's torch_dist files, checkpoint.json (ours: model, optimizer summary and the caller's
extra values), files.json (size and SHA-256 of every file but itself and the marker) and, written last, COMPLETE (the SHA-256 of
files.json). The directory gets its name by a rename when all of it is durable.
"""
