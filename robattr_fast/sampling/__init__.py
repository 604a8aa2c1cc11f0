"""How noisy copies go through the model: arguments, a measured trial, batches, the captured step."""
