"""Models of Hugging Face transformers: configs and weights in both directions."""
