"""How wide convlora works: every architecture name planned, one network of each kind the whole way, beside peft."""
