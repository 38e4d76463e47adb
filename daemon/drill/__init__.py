"""Restart-recovery drills."""
