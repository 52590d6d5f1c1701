"""The embedded base model `mini`, from nothing: corpus, tokenizer, training script and gates. Not imported by adapterd."""
