"""What adapting buys: accuracy on real images beside what else one would do, under equal treatment."""
