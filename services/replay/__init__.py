"""Tables and pictures of replays; the replay itself is `kvstore.eviction.replay`."""
