"""A running system, watched: on the terminal by ``concertina top``, in a browser by ``concertina console``."""
