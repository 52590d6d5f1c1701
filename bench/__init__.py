"""Measurements: what the machine allows, what we and others take. Nothing here is imported by the package."""
