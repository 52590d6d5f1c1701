"""What runs on the device: the base, its seams, adapter memory, KV memory, sampling. No HTTP."""
