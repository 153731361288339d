"""Hyperparameter searches at small scale. The only package that imports optuna."""
