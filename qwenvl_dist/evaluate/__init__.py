"""What a model says: captions by greedy generation, the loss, and a look at before and after."""
