"""The reference's file formats, to and from our records.

Readers take a `root` that no path in a file may lead out of, and put the images into a store; writers copy them
beside the file.  What survives both ways is everything a format holds but the names of its image files, since an
image is known by its pixels; what a format cannot hold, the function that writes it says.
Formats: InterleaveThinker, arXiv 2606.13679, and its code of June 2026.
"""
