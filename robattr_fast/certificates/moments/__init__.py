"""Second moments of the maps, and what they prove: distance, cosine, overlap."""
