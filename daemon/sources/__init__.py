"""Where messages come from: one module per transport. They feed the pure stream state and carry out its verdicts."""
