"""Where adapters come from: what a source may be, what is allowed, downloading it, and keeping what was downloaded.

Nothing here knows a base or a tensor: a source is a handful of files with hashes. No torch.
"""
