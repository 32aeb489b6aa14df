"""Parts of tensors: the indices of shards, boxes and rows."""
