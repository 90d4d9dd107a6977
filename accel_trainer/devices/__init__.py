"""What computes: hardware, the prepared model, memory, and agreement between the processes."""
