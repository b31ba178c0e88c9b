"""A system that `up` brought up on this machine: what it is made of, where that is written down, and how it is ended."""
