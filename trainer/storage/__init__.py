"""Objects in a bucket or folder, and what they mean: checkpoints, claims, data bindings."""
