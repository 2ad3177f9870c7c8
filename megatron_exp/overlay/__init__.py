"""What the model is trained on: base stream + manifest, applied when a slot is read."""
