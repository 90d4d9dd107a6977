"""What people look at: the screen, the page and picture of a run, trackers."""
