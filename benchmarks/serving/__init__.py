"""One base and many adapters behind HTTP: requests of different adapters go through the network in one batch."""
