"""Files and arrays: what lies on disk, how it is read, and pictures of it. Knows no models."""
