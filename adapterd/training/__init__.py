"""Making adapters: rows to tokens and masks, one flat training loop."""
