"""What every room stands on: lines on the screen, messages between processes, plain data as JSON."""
