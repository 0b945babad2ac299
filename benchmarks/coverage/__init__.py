"""Networks that convlora works on, beside peft: plans of every architecture, all steps on one network of each kind."""
