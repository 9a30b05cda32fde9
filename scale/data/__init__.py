"""Data: sources -> documents -> tokenizer -> token store -> packed rows -> resumable batches."""
