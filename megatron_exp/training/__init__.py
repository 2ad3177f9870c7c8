"""Training: a short loop on megatron-core that reads a manifest and writes a run directory.

    train -> make_plan (manifest, corpus, overlay) -> choose_beginning (checkpoint?) -> assemble (model, optimizer, feed) -> train_loop

`loop` is the whole of the loop; `hooks` holds everything else that happens in a run, one file for each feature.
"""
