"""Other inference engines, asked for their activations."""
