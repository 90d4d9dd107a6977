"""The run folder: checkpoints, best weights, and how a run goes on from them."""
