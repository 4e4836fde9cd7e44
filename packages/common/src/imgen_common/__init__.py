"""What flowbp and interleave stand on: configuration, files, run folders, model references, random streams, images.

Knows neither product.
"""
