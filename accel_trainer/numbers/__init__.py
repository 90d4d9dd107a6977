"""What is computed: losses, metrics, gradients, buffers, and the order in which they are added up."""
