"""The tokenizer and the chat template: conversations in, token ids and what is trained out."""
