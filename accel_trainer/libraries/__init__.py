"""What is known of the models and files of other libraries, so that nothing else has to know it."""
