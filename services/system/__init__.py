"""A system on this machine: what it is made of, where that is written down, how it is started and ended."""
