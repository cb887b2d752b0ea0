"""Chat messages, as prompts and completions hold them."""
