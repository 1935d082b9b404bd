"""Compares a model's answers with a baseline's by a judge, as Arena-Hard does."""
