"""What a person names: images and models."""
