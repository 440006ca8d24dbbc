"""Lightning tasks around the model, checkpoints, and the training command line."""
