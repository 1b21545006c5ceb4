"""Accuracy on questions that are not trained on."""
