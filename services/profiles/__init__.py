"""Profiles are made, found and shared without a person (DESIGN §5).

`local` keeps them as files, `shared` in the store, `calibrator` makes them, `claim` sees to it that one worker of a cluster does, and
`keeper` puts these together for a worker. `obtain` is for commands that measure: the same places, without a cluster.
"""
