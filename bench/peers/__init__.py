"""Other servers and libraries: how each is set up, started and measured."""
