"""Data sets: a file for each kind of download, for synthetic ones, and for checks of any."""
