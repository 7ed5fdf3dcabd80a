"""Draft models for speculative decoding: losses to train them by, and how much of what they propose is accepted."""
