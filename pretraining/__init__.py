"""How the embedded base model `mini` is made: corpus, tokenizer, training, gates. adapterd does not import it."""
