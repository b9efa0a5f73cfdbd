"""How the shipped models were made: tokenizer, data, training, card."""
