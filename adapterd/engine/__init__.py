"""What is decided: residency, KV blocks, scheduling, text. Only engine.py touches the model."""
