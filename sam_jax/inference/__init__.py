"""Using a trained model: prompts in, masks out."""
