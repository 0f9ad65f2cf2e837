"""What predict.py, export.py and app.py share: from files to predictions, and to files again."""
