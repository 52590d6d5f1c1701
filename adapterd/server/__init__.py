"""HTTP: the OpenAI-shaped API over the engine. No torch."""
