"""Files that ship with the package: the demo's model, tokenizer and data."""
