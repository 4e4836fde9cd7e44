"""The miniature world: captioned 32x32 images of shapes, edits, an exact verifier and tiny trained models."""
