"""FP8 products and the scales that unit scaling fixes in advance."""
