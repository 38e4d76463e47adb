"""Whole indexes: copied from one backend to another, compared, checked."""
