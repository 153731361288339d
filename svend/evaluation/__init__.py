"""What a model is worth, measured on data that it was not trained on."""
