"""Many images: what is sampled, written, found again and recorded."""
