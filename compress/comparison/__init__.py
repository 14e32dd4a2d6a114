"""Recipes beside each other, over seeds."""
