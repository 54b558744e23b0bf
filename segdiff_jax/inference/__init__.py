"""A photo and class names in; labels, scores, pictures and pages out."""
