"""Small tools that every room uses: lines on the screen, messages between processes, plain data as JSON."""
