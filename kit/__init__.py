"""Adapt pretrained Hugging Face models to a domain, driven by YAML recipes."""
