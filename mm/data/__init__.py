"""From files to batches: specs, readers, records, tokenizer, collation; knows no network."""
