"""Text to samples: corpus, tokenizer, shards, packing, loader. Takes (index, count), never a mesh."""
